package org.keydiff.core

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtProvider
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer

private const val NEXT = "_next"
private const val APPENDED = "_appended"
private const val LOGITS = "logits"

/**
 * Runs `prefill.onnx` and `decode.onnx` over one set of cache buffers. Each buffer is passed as a graph input and pinned
 * as the graph output of the same name plus "_next", so ONNX Runtime writes it in place and no step copies a cache. A
 * prefill step writes twice; what the first write leaves is an output, too ("_appended"), pinned to the same buffer.
 *
 * @param folder holds prefill.onnx, decode.onnx and their weights.
 * @param threads CPU threads; 0 lets ONNX Runtime choose.
 * @param qnn run on Qualcomm's NPU through the QNN execution provider, with no fallback to the CPU.
 * @throws UserError ONNX Runtime refuses a file or has no QNN provider, or more than one generated token leaves at once.
 */
class OrtEngine(folder: File, shape: CacheShape, threads: Int = 0, private val qnn: Boolean = false) :
    Engine(shape.budget, shape.block) {

    private val environment: OrtEnvironment = OrtEnvironment.getEnvironment().apply { setTelemetry(false) }
    private val state = mutableMapOf<String, OnnxTensor>()
    private val prefill: Method
    private val decode: Method

    override val description: String
        get() = "ONNX Runtime ${environment.version} on ${if (qnn) "the NPU (QNN)" else "the CPU"}"

    init {
        if (shape.evictEvery > 1) {
            throw UserError("$folder lets ${shape.evictEvery} generated tokens leave at once, and this app one: export it again with evict_every 1")
        }
        options(threads).use { options ->
            prefill = Method(File(folder, "prefill.onnx"), options)
            decode = Method(File(folder, "decode.onnx"), options)
        }
    }

    override fun run(tokens: LongArray, start: Int): FloatArray =
        if (tokens.size == 1) decode.run(tokens, start) else prefill.run(tokens, start)

    override fun close() {
        prefill.close()
        decode.close()
        state.values.forEach(OnnxTensor::close)
    }

    /** A copy of a state tensor's bytes, for tests: e.g. "keys_0". */
    internal fun stateBytes(name: String): ByteArray = state.getValue(name).byteBuffer.let { buffer ->
        ByteArray(buffer.remaining()).also(buffer::get)
    }

    private fun options(threads: Int): OrtSession.SessionOptions {
        val options = OrtSession.SessionOptions()
        options.setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR)
        // The arena grows in powers of two and gives nothing back: for the demo model a fifth more memory, no more speed.
        options.setCPUArenaAllocator(false)
        options.setMemoryPatternOptimization(false)
        if (threads > 0) options.setIntraOpNumThreads(threads)
        if (qnn) {
            if (OrtProvider.QNN !in OrtEnvironment.getAvailableProviders()) {
                throw UserError("this build of ONNX Runtime has no QNN provider: choose the CPU artifact")
            }
            options.addQnn(mapOf("backend_path" to "libQnnHtp.so", "htp_performance_mode" to "burst"))
            options.addConfigEntry("session.disable_cpu_ep_fallback", "1")
        }
        return options
    }

    /** One session with everything bound that it takes and gives. */
    private inner class Method(file: File, options: OrtSession.SessionOptions) : AutoCloseable {
        private val session: OrtSession = try {
            environment.createSession(file.path, options)
        } catch (error: OrtException) {
            throw UserError("$file is not a model that ONNX Runtime can load: export it again", error)
        }
        private val owned = mutableListOf<OnnxTensor>()
        private val longs = mutableMapOf<String, LongBuffer>()
        private val inputs = mutableMapOf<String, OnnxTensor>()
        private val outputs = mutableMapOf<String, OnnxTensor>()
        private val logitsBuffer: FloatBuffer
        private val logits: FloatArray

        init {
            for ((name, node) in session.inputInfo) {
                val info = node.info as TensorInfo
                inputs[name] = if (name + NEXT in session.outputNames) {
                    state.getOrPut(name) { tensor(zeros(info), info) }
                } else {
                    val buffer = zeros(info)
                    longs[name] = buffer.asLongBuffer()
                    tensor(buffer, info).also(owned::add)
                }
            }
            val info = session.outputInfo.getValue(LOGITS).info as TensorInfo
            val buffer = zeros(info)
            logitsBuffer = buffer.asFloatBuffer()
            logits = FloatArray(logitsBuffer.capacity())
            outputs[LOGITS] = tensor(buffer, info).also(owned::add)
            for (name in session.outputNames - LOGITS) {
                outputs[name] = state.getValue(name.removeSuffix(NEXT).removeSuffix(APPENDED))
            }
        }

        fun run(tokens: LongArray, start: Int): FloatArray {
            longs.getValue("tokens").duplicate().put(tokens)
            longs.getValue("start").put(0, start.toLong())
            longs["count"]?.put(0, tokens.size.toLong())
            session.run(inputs, outputs).close()
            logitsBuffer.duplicate().get(logits)
            return logits
        }

        override fun close() {
            session.close()
            owned.forEach(OnnxTensor::close)
        }
    }

    private fun zeros(info: TensorInfo): ByteBuffer {
        val width = when (info.type) {
            OnnxJavaType.INT8 -> 1
            OnnxJavaType.FLOAT16 -> 2
            OnnxJavaType.FLOAT -> 4
            else -> 8
        }
        val count = info.shape.fold(1L) { product, length -> product * length }
        return ByteBuffer.allocateDirect(Math.toIntExact(count * width)).order(ByteOrder.nativeOrder())
    }

    private fun tensor(buffer: ByteBuffer, info: TensorInfo): OnnxTensor =
        OnnxTensor.createTensor(environment, buffer, info.shape, info.type)
}
