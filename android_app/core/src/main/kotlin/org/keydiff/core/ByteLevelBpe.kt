package org.keydiff.core

import kotlinx.serialization.SerializationException
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonNull
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.boolean
import kotlinx.serialization.json.jsonArray
import kotlinx.serialization.json.jsonObject
import kotlinx.serialization.json.jsonPrimitive
import kotlinx.serialization.json.long
import java.io.ByteArrayOutputStream
import java.io.File
import java.util.PriorityQueue

/**
 * Byte-level BPE from `tokenizer.json` (GPT-2's scheme, as Llama 3, Qwen, SmolLM and Granite use it), with no native
 * library. Tests hold it to Hugging Face's own tokenizers. Anything in the file that it does not know is refused.
 */
class ByteLevelBpe(file: File) : TextTokenizer {
    private val vocabulary = HashMap<String, Long>()
    private val ranks = HashMap<Pair<String, String>, Int>()
    private val tokens = HashMap<Long, String>()
    private val special = HashMap<String, Long>()
    private val hidden = HashSet<Long>()
    private val added: Regex?
    private val splits: List<Regex>
    private val before: LongArray
    private val after: LongArray
    private val wholeWords: Boolean

    init {
        try {
            val root = json.parseToJsonElement(file.readText()).jsonObject
            val model = root.section("model")
            known(model.text("type") == "BPE" && model.flag("byte_fallback") != true, "model")
            known(root["normalizer"].let { it == null || it is JsonNull }, "normalizer")
            known(root.section("decoder").text("type") == "ByteLevel", "decoder")
            model.section("vocab").forEach { (token, id) -> vocabulary[token] = id.jsonPrimitive.long }
            model.getValue("merges").jsonArray.forEachIndexed { rank, merge -> ranks[pair(merge)] = rank }
            vocabulary.forEach { (token, id) -> tokens[id] = token }
            wholeWords = model.flag("ignore_merges") == true
            root.getValue("added_tokens").jsonArray.forEach { addToken(it.jsonObject) }
            added = special.keys.sortedByDescending(String::length).joinToString("|", transform = Regex::escape)
                .takeIf(String::isNotEmpty)?.let(::Regex)
            splits = splits(root.section("pre_tokenizer"))
            val around = (root["post_processor"] as? JsonObject)?.let(::template) ?: (emptyList<Long>() to emptyList())
            before = around.first.toLongArray()
            after = around.second.toLongArray()
        } catch (error: Exception) {
            if (error !is SerializationException && error !is IllegalArgumentException && error !is NoSuchElementException) throw error
            throw UserError("$file cannot be loaded: ${error.message?.lineSequence()?.first()}", error)
        }
    }

    override fun encode(text: String, special: Boolean): LongArray {
        val ids = ArrayList<Long>()
        var start = 0
        for (match in added?.findAll(text).orEmpty()) {
            plain(text.substring(start, match.range.first), ids)
            ids += this.special.getValue(match.value)
            start = match.range.last + 1
        }
        plain(text.substring(start), ids)
        return if (special) before + ids.toLongArray() + after else ids.toLongArray()
    }

    override fun decode(tokens: LongArray): String {
        val bytes = ByteArrayOutputStream()
        for (id in tokens) {
            val token = this.tokens[id] ?: continue
            when {
                id in hidden -> continue
                token in special -> bytes.write(token.encodeToByteArray())
                else -> token.forEach { bytes.write(BYTES.getValue(it)) }
            }
        }
        return bytes.toByteArray().decodeToString()
    }

    override fun close() = Unit

    private fun addToken(entry: JsonObject) {
        val text = entry.getValue("content").jsonPrimitive.content
        known(entry.flag("lstrip") != true && entry.flag("rstrip") != true && entry.flag("single_word") != true, "added token $text")
        val id = entry.getValue("id").jsonPrimitive.long
        special[text] = id
        tokens[id] = text
        if (entry.flag("special") == true) hidden += id
    }

    private fun splits(pre: JsonObject): List<Regex> = when (val type = pre.text("type")) {
        "Sequence" -> pre.getValue("pretokenizers").jsonArray.flatMap { splits(it.jsonObject) }
        "ByteLevel" -> {
            known(pre.flag("add_prefix_space") != true, "add_prefix_space")
            if (pre.flag("use_regex") == false) emptyList() else listOf(pattern(GPT2))
        }
        "Digits" -> listOf(Regex(if (pre.flag("individual_digits") == true) "\\p{N}" else "\\p{N}+"))
        "Split" -> {
            known(pre.text("behavior") == "Isolated" && pre.flag("invert") != true, "Split")
            listOf(pattern(pre.section("pattern").text("Regex") ?: throw IllegalArgumentException("Split without Regex")))
        }
        else -> throw IllegalArgumentException("pre_tokenizer $type is not supported without the tokenizers library")
    }

    private fun template(processor: JsonObject): Pair<List<Long>, List<Long>> = when (processor.text("type")) {
        "ByteLevel" -> emptyList<Long>() to emptyList()
        "Sequence" -> processor.getValue("processors").jsonArray.map { template(it.jsonObject) }
            .fold(emptyList<Long>() to emptyList()) { all, one -> (all.first + one.first) to (all.second + one.second) }
        "TemplateProcessing" -> {
            val pieces = processor.getValue("single").jsonArray.map { it.jsonObject }
            val text = pieces.indexOfFirst { "Sequence" in it }
            fun ids(part: List<JsonObject>) = part.map { special.getValue(it.section("SpecialToken").text("id").orEmpty()) }
            ids(pieces.subList(0, text)) to ids(pieces.subList(text + 1, pieces.size))
        }
        else -> throw IllegalArgumentException("post_processor ${processor.text("type")} is not supported")
    }

    private fun plain(text: String, ids: MutableList<Long>) {
        var pieces = listOf(text)
        for (split in splits) pieces = pieces.flatMap { isolate(it, split) }
        for (piece in pieces) if (piece.isNotEmpty()) merge(piece, ids)
    }

    private fun isolate(text: String, split: Regex): List<String> {
        val pieces = ArrayList<String>()
        var start = 0
        for (match in split.findAll(text)) {
            if (match.value.isEmpty()) continue
            if (match.range.first > start) pieces += text.substring(start, match.range.first)
            pieces += match.value
            start = match.range.last + 1
        }
        if (start < text.length) pieces += text.substring(start)
        return pieces
    }

    /** Joins the pair that was learnt first, over and over; of equal pairs the leftmost. */
    private fun merge(piece: String, ids: MutableList<Long>) {
        val word = piece.encodeToByteArray().joinToString("") { CHARACTERS[it.toInt() and 0xFF].toString() }
        if (wholeWords) vocabulary[word]?.let { ids += it; return }
        val parts = arrayOfNulls<String>(word.length)
        word.forEachIndexed { i, character -> parts[i] = character.toString() }
        val next = IntArray(word.length) { it + 1 }
        val previous = IntArray(word.length) { it - 1 }
        val queue = PriorityQueue<Candidate>(compareBy({ it.rank }, { it.left }))
        fun offer(left: Int) {
            val right = if (left in parts.indices) next[left] else return
            if (right >= parts.size) return
            val rank = ranks[parts[left]!! to parts[right]!!] ?: return
            queue += Candidate(rank, left, right, parts[left]!!, parts[right]!!)
        }
        for (i in parts.indices) offer(i)
        while (true) {
            val best = queue.poll() ?: break
            if (parts[best.left] != best.first || parts[best.right] != best.second || next[best.left] != best.right) continue
            parts[best.left] = best.first + best.second
            parts[best.right] = null
            next[best.left] = next[best.right]
            if (next[best.right] < parts.size) previous[next[best.right]] = best.left
            offer(previous[best.left])
            offer(best.left)
        }
        for (part in parts) if (part != null) ids += vocabulary[part] ?: throw UserError("tokenizer.json has no token for \"$part\"")
    }

    private class Candidate(val rank: Int, val left: Int, val right: Int, val first: String, val second: String)

    private fun pair(merge: JsonElement): Pair<String, String> {
        val parts = (merge as? JsonArray)?.map { it.jsonPrimitive.content } ?: merge.jsonPrimitive.content.split(" ")
        return parts[0] to parts[1]
    }

    private fun known(holds: Boolean, what: String) =
        require(holds) { "this $what is not supported without the tokenizers library" }

    private fun JsonObject.section(name: String): JsonObject = getValue(name).jsonObject

    private fun JsonObject.text(name: String): String? = (this[name] ?: JsonNull).jsonPrimitive.content

    private fun JsonObject.flag(name: String): Boolean? =
        this[name]?.takeIf { it !is JsonNull }?.jsonPrimitive?.boolean

    private companion object {
        const val GPT2 = """'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
        const val BLANK = """\t-\r\x{85}\p{Z}"""

        /**
         * The pattern with blanks spelled out: \s is ASCII for the JVM and Unicode for Android's and for the original.
         * The classes of Unicode's White_Space that are not control characters are exactly \p{Z}.
         */
        fun pattern(original: String): Regex {
            val out = StringBuilder()
            var inClass = false
            var i = 0
            while (i < original.length) {
                val two = original.substring(i, minOf(i + 2, original.length))
                when {
                    two == "\\s" -> out.append(if (inClass) BLANK else "[$BLANK]").also { i++ }
                    two == "\\S" -> out.append("[^$BLANK]").also { require(!inClass) { "\\S inside a class is not supported" }; i++ }
                    two[0] == '\\' -> out.append(two).also { i++ }
                    else -> {
                        if (two[0] == '[') inClass = true
                        if (two[0] == ']') inClass = false
                        out.append(two[0])
                    }
                }
                i++
            }
            return Regex(out.toString())
        }

        /** GPT-2's printable stand-in for each byte: itself where it prints, else the next free one from U+0100 on. */
        val CHARACTERS: CharArray = run {
            val printable = (0x21..0x7E) + (0xA1..0xAC) + (0xAE..0xFF)
            var free = 0x100
            CharArray(256) { if (it in printable) it.toChar() else (free++).toChar() }
        }
        val BYTES: Map<Char, Int> = CHARACTERS.withIndex().associate { (byte, character) -> character to byte }
    }
}
