package org.keydiff.core

import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Test
import java.io.File

class TextStreamTest {
    private val tokenizer = ByteLevelBpe(File(Fixtures.read.tiny, "tokenizer.json"))

    @Test
    fun `a character over several tokens appears whole`() {
        val tokens = tokenizer.encode("a€ü", special = false)
        assertEquals(6, tokens.size)
        val stream = TextStream(tokenizer)
        assertEquals(listOf("a", "", "", "€", "", "ü"), tokens.map(stream::add))
        assertEquals("", stream.finish())
        assertEquals("a€ü", stream.text)
    }

    @Test
    fun `an unfinished character is given at the end`() {
        val stream = TextStream(tokenizer)
        tokenizer.encode("€", special = false).take(2).forEach { assertEquals("", stream.add(it)) }
        assertEquals("\uFFFD", stream.finish())
    }
}
