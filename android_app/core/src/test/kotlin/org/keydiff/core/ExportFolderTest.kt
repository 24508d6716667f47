package org.keydiff.core

import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertThrows
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import java.io.File

class ExportFolderTest {
    @TempDir
    lateinit var temporary: File

    private val copy by lazy { copyOf(openTiny(), File(temporary, "copy")) }

    private fun refusal(): String {
        val message = assertThrows(UserError::class.java) { ExportFolder.open(copy) }.message!!
        assertEquals(1, message.lines().size)
        return message
    }

    private fun editManifest(from: String, to: String) {
        val file = File(copy, "manifest.json")
        assertTrue(from in file.readText())
        file.writeText(file.readText().replaceFirst(from, to))
    }

    @Test
    fun `reads what the app needs`() {
        val manifest = ExportFolder.open(copy).manifest
        assertEquals("tiny", manifest.name)
        assertEquals(16 to 8, manifest.cache.budget to manifest.cache.block)
        assertEquals(listOf("onnxruntime"), manifest.artifacts.map { it.runtime })
        assertTrue(manifest.policy.evicts)
    }

    @Test
    fun `every file is announced before it is checked`() {
        val seen = mutableListOf<String>()
        ExportFolder.open(copy, seen::add)
        assertTrue("tokenizer.json" in seen && "onnx-cpu/weights.data" in seen)
    }

    @Test
    fun `a flipped byte is found`() {
        val file = File(copy, "onnx-cpu/weights.data")
        file.writeBytes(file.readBytes().also { it[1000] = (it[1000] + 1).toByte() })
        assertEquals("$file does not match its checksum in manifest.json: export the folder again and copy it whole", refusal())
    }

    @Test
    fun `half a file is found`() {
        val file = File(copy, "onnx-cpu/decode.onnx")
        file.writeBytes(file.readBytes().copyOf(100))
        assertTrue("decode.onnx does not match its checksum" in refusal())
    }

    @Test
    fun `a missing file is found`() {
        File(copy, "onnx-cpu/prefill.onnx").delete()
        assertTrue("prefill.onnx is missing" in refusal())
    }

    @Test
    fun `another schema version is refused`() {
        editManifest("\"schema_version\": 1", "\"schema_version\": 2")
        assertTrue("manifest.json does not match its schema at /schema_version" in refusal())
    }

    @Test
    fun `a missing field is refused`() {
        editManifest("\"vocab_size\"", "\"vocabulary\"")
        assertTrue("manifest.json does not match its schema at /model" in refusal())
    }

    @Test
    fun `a path out of the folder is refused`() {
        editManifest("\"path\": \"tokenizer.json\"", "\"path\": \"../tokenizer.json\"")
        assertTrue("does not match its schema at /files/" in refusal())
    }

    @Test
    fun `something else than JSON is refused`() {
        val file = File(copy, "manifest.json")
        file.writeText("{")
        assertTrue("manifest.json is not valid JSON" in refusal())
        file.writeBytes(byteArrayOf(0x7B, -1, -2, 0x7D))
        assertTrue("manifest.json is not valid JSON" in refusal())
    }

    @Test
    fun `a folder without a manifest is refused`() {
        File(copy, "manifest.json").delete()
        assertTrue("is not an exported folder: manifest.json is missing" in refusal())
    }

    @Test
    fun `an artifact that the folder lacks is refused`() {
        val error = assertThrows(UserError::class.java) { ExportFolder.open(copy).artifactFor("executorch") }
        assertTrue("has no artifact for executorch: it has onnxruntime" in error.message!!)
    }

    @Test
    fun `too little memory is refused with both figures`() {
        val folder = ExportFolder.open(copy)
        val artifact = folder.artifactFor("onnxruntime")
        folder.checkMemory(artifact, artifact.memoryBytes())
        val error = assertThrows(UserError::class.java) { folder.checkMemory(artifact, artifact.memoryBytes() - 1) }
        assertEquals(
            "tiny needs about ${megabytes(artifact.memoryBytes())} MB with onnxruntime and ${megabytes(artifact.memoryBytes() - 1)} MB are free: " +
                "close other apps, or export with --quant 8da4w or a smaller --budget",
            error.message,
        )
    }

    @Test
    fun `a planned figure replaces the estimate`() {
        val files = listOf(FileEntry("a", 100, ""), FileEntry("b", 50, ""))
        assertEquals(157, Artifact("t", "executorch", "int8", files, 5, 7).memoryBytes())
        assertEquals(460, Artifact("t", "onnxruntime", "int8", files, 5, null).memoryBytes())
        assertEquals(160, Artifact("t", "onnx-qnn", "fp16", files, 5, null).memoryBytes())
    }
}
