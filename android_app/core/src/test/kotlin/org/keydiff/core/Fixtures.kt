package org.keydiff.core

import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import java.io.File

/** What `scripts/android_fixtures.py` wrote: exported folders, and what `keydiff-export run` says of them. */
@Serializable
data class Fixtures(val tiny: String, val npu: String, val cases: List<Case>, val encodings: List<Encoding>) {
    companion object {
        val read: Fixtures by lazy {
            val file = System.getProperty("keydiff.fixtures")
                ?: error("set -Dkeydiff.fixtures=FILE: run `bash scripts/test_android.sh`, which makes it")
            json.decodeFromString(File(file).readText())
        }
    }
}

@Serializable
data class Case(
    val folder: String,
    val prompt: String,
    val raw: Boolean,
    @SerialName("max_new_tokens") val maxNewTokens: Int,
    @SerialName("prompt_tokens") val promptTokens: Int,
    @SerialName("token_ids") val tokens: List<Long>,
    val text: String,
    val evictions: Int,
    @SerialName("cache_slots") val slots: Int,
) {
    override fun toString() = "${File(folder).name}, $promptTokens tokens, ${if (raw) "raw" else "chat"}"
}

@Serializable
data class Encoding(
    val folder: String,
    val text: String,
    val ids: List<Long>,
    @SerialName("plain_ids") val plainIds: List<Long>,
    val decoded: String,
)

/** The tiny exported folder; opening it checks its checksums. */
fun openTiny(): ExportFolder = ExportFolder.open(File(Fixtures.read.tiny))

/** The same model for Qualcomm's NPU. */
fun openNpu(): ExportFolder = ExportFolder.open(File(Fixtures.read.npu))

/** ONNX Runtime on the CPU, also for what is meant for the NPU. */
fun ortEngine(folder: ExportFolder): Engine {
    val artifact = folder.manifest.artifacts.first { it.runtime.startsWith("onnx") }
    val place = File(folder.path, artifact.target)
    val shape = folder.manifest.cache
    return if (artifact.runtime == ONNX_QNN) OrtNpuEngine(place, shape, npu = false) else OrtEngine(place, shape)
}

fun tokenizer(folder: ExportFolder): TextTokenizer = DjlTokenizer(File(folder.path, "tokenizer.json"))

/** A copy of a folder that a test may damage. */
fun copyOf(folder: ExportFolder, target: File): File {
    folder.path.copyRecursively(target, overwrite = true)
    return target
}

object Silent : Progress
