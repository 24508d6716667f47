package org.keydiff.core

import org.junit.jupiter.api.Assertions.assertArrayEquals
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertThrows
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import org.junit.jupiter.params.ParameterizedTest
import org.junit.jupiter.params.provider.ValueSource
import java.io.File
import kotlin.random.Random

/** Both tokenizers give the ids that Hugging Face's give in Python, and each other's on any text. */
class TokenizerTest {
    @TempDir
    lateinit var temporary: File

    private fun open(kind: String, folder: String): TextTokenizer {
        val file = File(folder, "tokenizer.json")
        return if (kind == "djl") DjlTokenizer(file) else ByteLevelBpe(file)
    }

    @ParameterizedTest
    @ValueSource(strings = ["djl", "kotlin"])
    fun `encodes and decodes as in Python`(kind: String) {
        for ((folder, encodings) in Fixtures.read.encodings.groupBy { it.folder }) {
            open(kind, folder).use { tokenizer ->
                for (case in encodings) {
                    assertEquals(case.ids, tokenizer.encode(case.text, special = true).toList(), case.text)
                    assertEquals(case.plainIds, tokenizer.encode(case.text, special = false).toList(), case.text)
                    assertEquals(case.decoded, tokenizer.decode(case.ids.toLongArray()), case.text)
                }
            }
        }
    }

    @Test
    fun `long texts are not cut`() {
        assertTrue(Fixtures.read.encodings.maxOf { it.ids.size } > 2000)
    }

    @Test
    fun `both agree on random text`() {
        val random = Random(1)
        val alphabet = "aAbz 09 '\n\t.,-_é漢\u00a0\u3000ß\u0301".toList() + listOf("👩‍👧", "'ll", "  ", "<|im_end|>", "\r\n")
        for (folder in Fixtures.read.encodings.map { it.folder }.distinct()) {
            open("djl", folder).use { theirs ->
                val ours = open("kotlin", folder)
                repeat(2000) {
                    val text = List(random.nextInt(1, 60)) { alphabet.random(random) }.joinToString("")
                    assertArrayEquals(theirs.encode(text, false), ours.encode(text, false), text)
                }
            }
        }
    }

    @ParameterizedTest
    @ValueSource(strings = ["djl", "kotlin"])
    fun `a damaged file is one line`(kind: String) {
        File(temporary, "tokenizer.json").writeText("""{"version": "1.0", "model": {"type": "BPE"}""")
        val error = assertThrows(UserError::class.java) { open(kind, temporary.path) }
        assertTrue(error.message!!.startsWith("${temporary.path}/tokenizer.json cannot be loaded: "))
        assertEquals(1, error.message!!.lines().size)
    }

    @Test
    fun `what the Kotlin tokenizer does not know it refuses`() {
        val file = File(Fixtures.read.tiny, "tokenizer.json").readText()
        for ((known, unknown) in listOf(
            "\"type\": \"BPE\"" to "\"type\": \"Unigram\"",
            "\"normalizer\": null" to "\"normalizer\": {\"type\": \"NFKC\"}",
            "\"add_prefix_space\": false" to "\"add_prefix_space\": true",
        )) {
            assertTrue(known in file)
            File(temporary, "tokenizer.json").writeText(file.replaceFirst(known, unknown))
            val error = assertThrows(UserError::class.java) { open("kotlin", temporary.path) }
            assertTrue("not supported" in error.message!!, error.message)
        }
    }
}
