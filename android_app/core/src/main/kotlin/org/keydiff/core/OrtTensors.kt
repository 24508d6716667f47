package org.keydiff.core

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer

internal const val NEXT = "_next"
internal const val LOGITS = "logits"

/** The one environment of ONNX Runtime, with its usage reports turned off. */
internal fun ortEnvironment(): OrtEnvironment = OrtEnvironment.getEnvironment().apply { setTelemetry(false) }

internal fun ortOptions(threads: Int): OrtSession.SessionOptions = OrtSession.SessionOptions().apply {
    setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_ERROR)
    // The arena grows in powers of two and gives nothing back: for the demo model a fifth more memory, no more speed.
    setCPUArenaAllocator(false)
    setMemoryPatternOptimization(false)
    if (threads > 0) setIntraOpNumThreads(threads)
}

/** A tensor over memory of our own, zeros at first: passed to and pinned by ONNX Runtime, never copied. */
internal class Buffer(environment: OrtEnvironment, info: TensorInfo) : AutoCloseable {
    val bytes: ByteBuffer = ByteBuffer
        .allocateDirect(Math.toIntExact(info.shape.fold(1L) { product, length -> product * length } * info.type.size))
        .order(ByteOrder.nativeOrder())
    val tensor: OnnxTensor = OnnxTensor.createTensor(environment, bytes, info.shape, info.type)

    val longs: LongBuffer get() = bytes.asLongBuffer()
    val floats: FloatBuffer get() = bytes.asFloatBuffer()

    override fun close() = tensor.close()
}
