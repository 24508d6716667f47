package org.keydiff.core

import org.junit.jupiter.api.Assertions.assertArrayEquals
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertFalse
import org.junit.jupiter.api.Assertions.assertThrows
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Assumptions.assumeTrue
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import org.junit.jupiter.params.ParameterizedTest
import org.junit.jupiter.params.provider.ValueSource
import java.io.File

class OrtEngineTest {
    @TempDir
    lateinit var temporary: File

    private fun tokens(count: Int, seed: Int = 0) = LongArray(count) { 4L + (it * 7 + seed) % 200 }

    @ParameterizedTest
    @ValueSource(strings = ["onnxruntime", "onnx-qnn"])
    fun `reset starts over`(runtime: String) {
        ortEngine(if (runtime == ONNX_QNN) openNpu() else openTiny()).use { engine ->
            val steps = listOf(8, 8, 8, 5, 1, 1, 1).map { tokens(it, it) }
            val first = steps.map { engine.step(it).copyOf() }
            assertEquals(ContextMeter(32, 16, 16), engine.meter)
            assertEquals(16, engine.meter.evicted)
            engine.step(tokens(8, 3))
            engine.reset()
            assertEquals(ContextMeter(0, 0, 16), engine.meter)
            for ((step, expected) in steps.zip(first)) assertArrayEquals(expected, engine.step(step))
        }
    }

    @Test
    fun `caches are written where they lie`() {
        val folder = openTiny()
        OrtEngine(File(folder.path, "onnx-cpu"), folder.manifest.cache).use { engine ->
            assertTrue(engine.stateBytes("keys_0").all { it == 0.toByte() })
            engine.step(tokens(8))
            val afterPrefill = engine.stateBytes("keys_0")
            assertFalse(afterPrefill.all { it == 0.toByte() })
            engine.step(tokens(1))
            val afterDecode = engine.stateBytes("keys_0")
            val changed = afterPrefill.indices.count { afterPrefill[it] != afterDecode[it] }
            assertTrue(changed in 1..2 * 32 * Float.SIZE_BYTES, "one row of 32 numbers a KV head, changed $changed bytes")
        }
    }

    @Test
    fun `two engines do not share a cache`() {
        val folder = openTiny()
        ortEngine(folder).use { first ->
            ortEngine(folder).use { second ->
                val expected = first.step(tokens(8)).copyOf()
                repeat(3) { first.step(tokens(8, it)) }
                assertArrayEquals(expected, second.step(tokens(8)))
            }
        }
    }

    @Test
    fun `a step takes 1 to B tokens`() {
        ortEngine(openTiny()).use { engine ->
            assertThrows(IllegalArgumentException::class.java) { engine.step(tokens(0)) }
            assertThrows(IllegalArgumentException::class.java) { engine.step(tokens(9)) }
            assertEquals(0, engine.seen)
        }
    }

    @Test
    fun `a garbled model is one line`() {
        val folder = openTiny()
        val copy = copyOf(folder, File(temporary, "copy"))
        File(copy, "onnx-cpu/decode.onnx").writeText("not a model")
        val error = assertThrows(UserError::class.java) { OrtEngine(File(copy, "onnx-cpu"), folder.manifest.cache) }
        assertTrue(error.message!!.endsWith("decode.onnx is not a model that ONNX Runtime can load: export it again"))
    }

    @Test
    fun `a cache that evicts less often is refused`() {
        val folder = openTiny()
        val error = assertThrows(UserError::class.java) {
            OrtEngine(File(folder.path, "onnx-cpu"), folder.manifest.cache.copy(evictEvery = 4))
        }
        assertTrue(error.message!!.endsWith("lets 4 generated tokens leave at once, and this app one: export it again with evict_every 1"))
    }

    @Test
    fun `a build without QNN says so`() {
        val folder = openNpu()
        val error = assertThrows(UserError::class.java) { OrtNpuEngine(File(folder.path, "onnx-qnn"), folder.manifest.cache) }
        assertEquals("this build of ONNX Runtime has no QNN provider: choose another engine in the settings", error.message)
    }

    @Test
    fun `a garbled NPU model is one line`() {
        val folder = openNpu()
        val copy = copyOf(folder, File(temporary, "copy"))
        File(copy, "onnx-qnn/decode.onnx").writeText("not a model")
        val error = assertThrows(UserError::class.java) { OrtNpuEngine(File(copy, "onnx-qnn"), folder.manifest.cache, npu = false) }
        assertTrue(error.message!!.endsWith("decode.onnx is not taken by this phone's NPU: choose another engine in the settings"))
    }

    @Test
    fun `memory stays within what the manifest announces`() {
        val case = Fixtures.read.cases.maxBy { it.promptTokens }
        assumeTrue(case.promptTokens >= 8000, "needs the demo model: scripts/android_fixtures.py OUTPUT --demo FOLDER")
        val java = File(System.getProperty("java.home"), "bin/java").path
        val classes = System.getProperty("surefire.test.class.path") ?: System.getProperty("java.class.path")
        // A process of its own: this one keeps what other tests gave back.
        val probe = ProcessBuilder(java, "-Xmx256m", "-cp", classes, "org.keydiff.core.MemoryProbeKt", case.folder)
            .redirectError(ProcessBuilder.Redirect.INHERIT).start()
        val taken = probe.inputStream.bufferedReader().readText().trim().toLong()
        val announced = ExportFolder.open(File(case.folder)).artifactFor("onnxruntime").memoryBytes()
        assertTrue(taken < announced, "took ${megabytes(taken)} MB, announced ${megabytes(announced)} MB")
        assertTrue(taken > announced / 3, "took only ${megabytes(taken)} MB of ${megabytes(announced)} MB announced")
        println("memory: took ${megabytes(taken)} MB, announced ${megabytes(announced)} MB")
    }
}
