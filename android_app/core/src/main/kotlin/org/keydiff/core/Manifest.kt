package org.keydiff.core

import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.JsonElement

/** The parts of `manifest.json` that the app uses; `manifest.schema.json` describes all of it. */
@Serializable
data class Manifest(
    val name: String,
    val model: ModelInfo,
    val policy: Policy,
    val cache: CacheShape,
    val files: List<FileEntry>,
    val artifacts: List<Artifact>,
)

@Serializable
data class ModelInfo(
    val architecture: String,
    @SerialName("context_limit") val contextLimit: Int,
    @SerialName("vocab_size") val vocabSize: Int,
    @SerialName("eos_token_ids") val eosTokenIds: List<Long>,
)

@Serializable
data class Policy(val name: String) {
    /** Whether tokens leave the cache; `full` keeps all and refuses longer prompts. */
    val evicts: Boolean get() = name != "full"
}

/**
 * [budget] is N, the tokens held a layer and KV head; [block] is B, the tokens read a step; [evictEvery] is how many
 * generated tokens leave at once.
 */
@Serializable
data class CacheShape(
    val budget: Int,
    val block: Int,
    val bytes: Long,
    @SerialName("evict_every") val evictEvery: Int = 1,
)

@Serializable
data class FileEntry(val path: String, val bytes: Long, val sha256: String)

/** The runtime of artifacts for Qualcomm's NPU through ONNX Runtime. */
const val ONNX_QNN = "onnx-qnn"

@Serializable
data class Artifact(
    val target: String,
    val runtime: String,
    val quant: String,
    val files: List<FileEntry>,
    @SerialName("cache_bytes") val cacheBytes: Long,
    @SerialName("planned_memory_bytes") val plannedMemoryBytes: Long? = null,
    val methods: Map<String, JsonElement> = emptyMap(),
) {
    /**
     * Memory that this artifact may take once it is loaded. ExecuTorch plans its activations and caches at export and
     * says so. ONNX Runtime does not: it repacks the weights for each of its two sessions, and what it works in, of which
     * no file tells, is taken to be at most as large as the weights once more. For the NPU, whose weights are compiled
     * already, it is taken to be all files and both copies of the cache.
     */
    fun memoryBytes(): Long {
        val weights = files.sumOf { it.bytes }
        return when {
            plannedMemoryBytes != null -> weights + plannedMemoryBytes
            runtime == ONNX_QNN -> weights + 2 * cacheBytes
            else -> 3 * weights + 2 * cacheBytes
        }
    }
}
