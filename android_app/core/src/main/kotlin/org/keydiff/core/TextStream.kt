package org.keydiff.core

private const val UNFINISHED = '\uFFFD'

/** Token by token to text. A character whose bytes are spread over tokens is held back until it is whole. */
internal class TextStream(private val tokenizer: TextTokenizer) {
    private val ids = mutableListOf<Long>()

    val tokens: List<Long> get() = ids

    /** What was given out so far. */
    var text: String = ""
        private set

    /** Takes a token and returns the text that became whole with it. */
    fun add(token: Long): String {
        ids += token
        val whole = tokenizer.decode(ids.toLongArray())
        return if (whole.endsWith(UNFINISHED)) "" else give(whole)
    }

    /** The rest, unfinished characters included. */
    fun finish(): String = give(tokenizer.decode(ids.toLongArray()))

    private fun give(whole: String): String {
        val piece = whole.substring(minOf(text.length, whole.length))
        text = whole
        return piece
    }
}
