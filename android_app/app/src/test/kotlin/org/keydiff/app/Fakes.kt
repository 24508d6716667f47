package org.keydiff.app

import kotlinx.serialization.json.Json
import kotlinx.serialization.json.jsonObject
import kotlinx.serialization.json.jsonPrimitive
import org.keydiff.core.Artifact
import org.keydiff.core.Engine
import org.keydiff.core.ExportFolder
import org.keydiff.core.TextTokenizer
import java.io.File

/** The tiny exported folder that `scripts/android_fixtures.py` made. */
val tinyFolder: File by lazy {
    val file = System.getProperty("keydiff.fixtures") ?: error("set -Dkeydiff.fixtures=FILE: run `bash scripts/test_android.sh`")
    File(Json.parseToJsonElement(File(file).readText()).jsonObject.getValue("tiny").jsonPrimitive.content)
}

/** Says [answer] and then the end token, whatever it reads; [onStep] is told the position of every step. */
class FakeEngine(private val answer: String, private val end: Int, private val onStep: (Int) -> Unit) : Engine(16, 8) {
    var closed = false
    private var said = 0
    override val description = "fake engine"

    override fun run(tokens: LongArray, start: Int): FloatArray {
        onStep(start)
        val heardItself = tokens.singleOrNull() == answer.getOrNull(said)?.code?.toLong()
        said = if (heardItself) said + 1 else 0
        return FloatArray(256).also { it[if (said < answer.length) answer[said].code else end] = 1f }
    }

    override fun close() {
        closed = true
    }
}

/** One token a character. */
object Characters : TextTokenizer {
    override fun encode(text: String, special: Boolean) = text.map { it.code.toLong() and 0xFF }.toLongArray()

    override fun decode(tokens: LongArray) = tokens.joinToString("") { it.toInt().toChar().toString() }

    override fun close() = Unit
}

class FakeEngines(private val answer: String = "Paris.", private val onStep: (Int) -> Unit = {}) : Engines {
    val opened = mutableListOf<FakeEngine>()

    override fun open(folder: ExportFolder, artifact: Artifact): Engine =
        FakeEngine(answer, folder.manifest.model.eosTokenIds.first().toInt(), onStep).also(opened::add)

    override fun tokenizer(folder: ExportFolder): TextTokenizer = Characters
}

class FakeDevice(var available: Long = 4_000_000_000, var resident: Long = 123_456_789) : Device {
    override fun availableBytes() = available

    override fun residentBytes() = resident

    override val description = "test phone"
}
