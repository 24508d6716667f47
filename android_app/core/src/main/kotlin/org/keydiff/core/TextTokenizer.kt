package org.keydiff.core

import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer
import java.io.File

/** Text to token ids and back, as `tokenizer.json` says. */
interface TextTokenizer : AutoCloseable {
    /** Token ids of [text]; [special] adds what the model expects around a plain text, e.g. a start token. */
    fun encode(text: String, special: Boolean): LongArray

    /** Text of token ids, special tokens left out. An unfinished character is U+FFFD. */
    fun decode(tokens: LongArray): String
}

/** Hugging Face's own tokenizers library through DJL. Its Android library is a package of its own. */
class DjlTokenizer(file: File) : TextTokenizer {
    private val tokenizer: HuggingFaceTokenizer = try {
        // Without these DJL cuts texts at 512 tokens.
        HuggingFaceTokenizer.newInstance(file.toPath(), mapOf("truncation" to "false", "padding" to "false"))
    } catch (error: Exception) {
        throw UserError("$file cannot be loaded: ${error.message?.lineSequence()?.first()}", error)
    }

    override fun encode(text: String, special: Boolean): LongArray = tokenizer.encode(text, special, false).ids

    override fun decode(tokens: LongArray): String = tokenizer.decode(tokens, true)

    override fun close() = tokenizer.close()
}
