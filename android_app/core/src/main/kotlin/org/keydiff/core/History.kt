package org.keydiff.core

import kotlinx.serialization.Serializable
import kotlinx.serialization.SerializationException
import kotlinx.serialization.encodeToString
import java.io.File
import java.io.IOException

/** One question with its answer and the line of figures below it. */
@Serializable
data class Turn(val model: String, val question: String, val answer: String, val figures: String, val time: Long)

/** Turns kept in a file, the newest [limit] of them. The cache of a turn is not kept: a restart reads anew. */
class History(private val file: File, private val limit: Int = 200) {
    private val kept: ArrayDeque<Turn> = ArrayDeque(load())

    val turns: List<Turn> get() = kept.toList()

    /** Adds a turn and writes the file beside its place first, so that a killed app leaves a whole one. */
    fun add(turn: Turn) {
        kept += turn
        while (kept.size > limit) kept.removeFirst()
        val temporary = File(file.path + ".new")
        temporary.writeText(json.encodeToString(turns))
        if (!temporary.renameTo(file)) throw IOException("cannot write $file")
    }

    fun clear() {
        kept.clear()
        file.delete()
    }

    /** A damaged file is an empty history: it must not keep the app from starting. */
    private fun load(): List<Turn> {
        if (!file.isFile) return emptyList()
        return try {
            json.decodeFromString<List<Turn>>(file.readText())
        } catch (_: SerializationException) {
            emptyList()
        }
    }
}
