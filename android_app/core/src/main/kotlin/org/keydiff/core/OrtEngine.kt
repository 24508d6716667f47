package org.keydiff.core

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import java.io.File

private const val APPENDED = "_appended"

/**
 * Runs `prefill.onnx` and `decode.onnx` over one set of cache buffers. Each buffer is passed as a graph input and pinned
 * as the graph output of the same name plus "_next", so ONNX Runtime writes it in place and no step copies a cache. A
 * prefill step writes twice; what the first write leaves is an output, too ("_appended"), pinned to the same buffer.
 *
 * @param folder holds prefill.onnx, decode.onnx and their weights.
 * @param threads CPU threads; 0 lets ONNX Runtime choose.
 * @throws UserError ONNX Runtime refuses a file, or more than one generated token leaves at once.
 */
class OrtEngine(folder: File, shape: CacheShape, threads: Int = 0) : Engine(shape.budget, shape.block) {

    private val environment: OrtEnvironment = ortEnvironment()
    private val state = mutableMapOf<String, Buffer>()
    private val prefill: Method
    private val decode: Method

    override val description: String
        get() = "ONNX Runtime ${environment.version} on the CPU"

    init {
        if (shape.evictEvery > 1) {
            throw UserError("$folder lets ${shape.evictEvery} generated tokens leave at once, and this app one: export it again with evict_every 1")
        }
        ortOptions(threads).use { options ->
            prefill = Method(File(folder, "prefill.onnx"), options)
            decode = Method(File(folder, "decode.onnx"), options)
        }
    }

    override fun run(tokens: LongArray, start: Int): FloatArray =
        if (tokens.size == 1) decode.run(tokens, start) else prefill.run(tokens, start)

    override fun close() {
        prefill.close()
        decode.close()
        state.values.forEach(Buffer::close)
    }

    /** A copy of a state tensor's bytes, for tests: e.g. "keys_0". */
    internal fun stateBytes(name: String): ByteArray = state.getValue(name).bytes.let { bytes ->
        ByteArray(bytes.capacity()).also(bytes.duplicate()::get)
    }

    /** One session with everything bound that it takes and gives. */
    private inner class Method(file: File, options: OrtSession.SessionOptions) : AutoCloseable {
        private val session: OrtSession = try {
            environment.createSession(file.path, options)
        } catch (error: OrtException) {
            throw UserError("$file is not a model that ONNX Runtime can load: export it again", error)
        }
        private val owned = mutableListOf<Buffer>()
        private val longs = mutableMapOf<String, Buffer>()
        private val inputs = mutableMapOf<String, OnnxTensor>()
        private val outputs = mutableMapOf<String, OnnxTensor>()
        private val logitsBuffer: Buffer
        private val logits: FloatArray

        init {
            for ((name, node) in session.inputInfo) {
                val info = node.info as TensorInfo
                inputs[name] = if (name + NEXT in session.outputNames) {
                    state.getOrPut(name) { Buffer(environment, info) }.tensor
                } else {
                    buffer(info).also { longs[name] = it }.tensor
                }
            }
            logitsBuffer = buffer(session.outputInfo.getValue(LOGITS).info as TensorInfo)
            logits = FloatArray(logitsBuffer.floats.capacity())
            outputs[LOGITS] = logitsBuffer.tensor
            for (name in session.outputNames - LOGITS) {
                outputs[name] = state.getValue(name.removeSuffix(NEXT).removeSuffix(APPENDED)).tensor
            }
        }

        fun run(tokens: LongArray, start: Int): FloatArray {
            longs.getValue("tokens").longs.put(tokens)
            longs.getValue("start").longs.put(0, start.toLong())
            longs["count"]?.longs?.put(0, tokens.size.toLong())
            session.run(inputs, outputs).close()
            logitsBuffer.floats.get(logits)
            return logits
        }

        private fun buffer(info: TensorInfo) = Buffer(environment, info).also(owned::add)

        override fun close() {
            session.close()
            owned.forEach(Buffer::close)
        }
    }
}
