package org.keydiff.core

import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtProvider
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import java.io.File

private const val COMPILED = "phone"

/**
 * Runs an artifact of the target `onnx-qnn`. Each step has two halves: `*_inputs.onnx` on the CPU (embedding, rotation,
 * masks) and `prefill.onnx` or `decode.onnx` on Qualcomm's NPU, which takes the state and gives the next one. The two
 * change places after every step, so none is copied.
 *
 * @param folder the artifact's; what was compiled for a phone (`phone/`) is taken where it is there.
 * @param npu false runs both halves on the CPU: for tests, on machines that have no such processor.
 * @throws UserError this build has no QNN provider, or the NPU refuses the model.
 */
class OrtNpuEngine(folder: File, shape: CacheShape, private val npu: Boolean = true) : Engine(shape.budget, shape.block) {
    private val environment: OrtEnvironment = ortEnvironment()
    private val owned = mutableListOf<AutoCloseable>()
    private var state = mapOf<String, Buffer>()
    private var spare = mapOf<String, Buffer>()
    private val prefill: Method
    private val decode: Method

    override val description: String
        get() = "ONNX Runtime ${environment.version} on ${if (npu) "the NPU (QNN)" else "the CPU, the NPU's graph"}"

    init {
        if (npu && OrtProvider.QNN !in OrtEnvironment.getAvailableProviders()) {
            throw UserError("this build of ONNX Runtime has no QNN provider: choose another engine in the settings")
        }
        val compiled = File(folder, COMPILED)
        val steps = if (npu && compiled.isDirectory) compiled else folder
        try {
            prefill = Method(File(folder, "prefill_inputs.onnx"), File(steps, "prefill.onnx"))
            decode = Method(File(folder, "decode_inputs.onnx"), File(steps, "decode.onnx"))
        } catch (error: UserError) {
            close()
            throw error
        }
    }

    override fun run(tokens: LongArray, start: Int): FloatArray =
        if (tokens.size == 1) decode.run(tokens, start) else prefill.run(tokens, start)

    override fun close() = owned.asReversed().forEach { it.close() }

    private fun stepOptions() = ortOptions(threads = 0).apply {
        if (npu) {
            addQnn(mapOf("backend_path" to "libQnnHtp.so", "htp_performance_mode" to "burst", "offload_graph_io_quantization" to "0"))
            addConfigEntry("session.disable_cpu_ep_fallback", "1")
        }
    }

    private fun session(file: File, options: OrtSession.SessionOptions, refusal: String): OrtSession = options.use {
        try {
            environment.createSession(file.path, it).also(owned::add)
        } catch (error: OrtException) {
            throw UserError("$file $refusal", error)
        }
    }

    /** Both halves of a step, with everything bound that passes between them. */
    private inner class Method(hostFile: File, stepFile: File) {
        private val host = session(hostFile, ortOptions(threads = 0), "is not a model that ONNX Runtime can load: export it again")
        private val step = session(stepFile, stepOptions(), "is not taken by this phone's NPU: choose another engine in the settings")
        private val given = host.inputInfo.mapValues { (_, node) -> buffer(node.info as TensorInfo) }
        private val between = host.outputInfo.mapValues { (_, node) -> buffer(node.info as TensorInfo) }
        private val logitsBuffer = buffer(step.outputInfo.getValue(LOGITS).info as TensorInfo)
        private val logits = FloatArray(logitsBuffer.floats.capacity())
        private val passed = between.filterKeys { it in step.inputNames }.mapValues { (_, buffer) -> buffer.tensor }

        init {
            // The first method makes the state of both.
            if (state.isEmpty()) {
                val kept = step.inputInfo.filterKeys { it + NEXT in step.outputNames }
                state = kept.mapValues { (_, node) -> buffer(node.info as TensorInfo) }
                spare = kept.mapValues { (_, node) -> buffer(node.info as TensorInfo) }
            }
        }

        fun run(tokens: LongArray, start: Int): FloatArray {
            given.getValue("tokens").longs.put(tokens)
            given["start"]?.longs?.put(0, start.toLong())
            given["count"]?.longs?.put(0, tokens.size.toLong())
            host.run(given.mapValues { (_, buffer) -> buffer.tensor }, between.mapValues { (_, buffer) -> buffer.tensor }).close()
            val outputs = spare.entries.associate { (name, buffer) -> name + NEXT to buffer.tensor } + (LOGITS to logitsBuffer.tensor)
            step.run(passed + state.mapValues { (_, buffer) -> buffer.tensor }, outputs).close()
            state = spare.also { spare = state }
            logitsBuffer.floats.get(logits)
            return logits
        }
    }

    private fun buffer(info: TensorInfo) = Buffer(environment, info).also(owned::add)
}
