package org.keydiff.app

import org.keydiff.core.CacheShape
import org.keydiff.core.Engine
import org.keydiff.core.UserError
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor
import java.io.File

internal const val FORWARD = "forward"

/**
 * Steps the method `forward` of a .pte with ExecuTorch's Android package. It reads blocks and single tokens alike. The
 * other methods of the file are no use here: a Module gives every method memory, and so a cache, of its own.
 *
 * @throws UserError ExecuTorch refuses the file.
 */
class ExecuTorchEngine(file: File, shape: CacheShape, threads: Int = 0) : Engine(shape.budget, shape.block) {
    override val description = "ExecuTorch on the CPU (XNNPACK)"

    private val module: Module = try {
        Module.load(file.path, Module.LOAD_MODE_MMAP, threads).also { it.loadMethod(FORWARD) }
    } catch (error: RuntimeException) {
        throw UserError("$file is not a program that ExecuTorch can load: export it again (${error.message})", error)
    }

    override fun run(tokens: LongArray, start: Int): FloatArray {
        val outputs = module.execute(
            FORWARD,
            EValue.from(Tensor.fromBlob(tokens, longArrayOf(1, tokens.size.toLong()))),
            EValue.from(Tensor.fromBlob(longArrayOf(start.toLong()), longArrayOf(1))),
        )
        return outputs[0].toTensor().dataAsFloatArray
    }

    override fun close() = module.destroy()
}
