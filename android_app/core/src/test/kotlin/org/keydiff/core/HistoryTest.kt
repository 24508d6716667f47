package org.keydiff.core

import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import java.io.File

class HistoryTest {
    @TempDir
    lateinit var temporary: File

    private val file by lazy { File(temporary, "history.json") }

    private fun turn(number: Int) = Turn("tiny", "question $number\n\"ü\"", "answer", "1 token", number.toLong())

    @Test
    fun `turns survive a restart`() {
        History(file).apply { add(turn(1)); add(turn(2)) }
        assertEquals(listOf(turn(1), turn(2)), History(file).turns)
    }

    @Test
    fun `the newest are kept`() {
        val history = History(file, limit = 3)
        for (number in 1..5) history.add(turn(number))
        assertEquals(listOf(3L, 4L, 5L), History(file).turns.map { it.time })
    }

    @Test
    fun `a damaged file is an empty history that takes new turns`() {
        file.writeText("[{\"model\": ")
        val history = History(file)
        assertEquals(emptyList<Turn>(), history.turns)
        history.add(turn(1))
        assertEquals(listOf(turn(1)), History(file).turns)
    }

    @Test
    fun `a killed write leaves the old file`() {
        History(file).add(turn(1))
        File(file.path + ".new").writeText("[{")
        assertEquals(listOf(turn(1)), History(file).turns)
    }

    @Test
    fun `clear forgets`() {
        History(file).apply { add(turn(1)); clear() }
        assertEquals(emptyList<Turn>(), History(file).turns)
    }
}
