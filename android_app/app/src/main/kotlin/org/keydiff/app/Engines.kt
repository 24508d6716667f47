package org.keydiff.app

import org.keydiff.core.Artifact
import org.keydiff.core.ByteLevelBpe
import org.keydiff.core.DjlTokenizer
import org.keydiff.core.Engine
import org.keydiff.core.ExportFolder
import org.keydiff.core.ONNX_QNN
import org.keydiff.core.OrtEngine
import org.keydiff.core.OrtNpuEngine
import org.keydiff.core.TextTokenizer
import org.keydiff.core.UserError
import java.io.File

/** Turns an artifact into something that runs. */
interface Engines {
    fun open(folder: ExportFolder, artifact: Artifact): Engine

    fun tokenizer(folder: ExportFolder): TextTokenizer
}

/** The engines of this build, by the manifest's runtime. */
object AndroidEngines : Engines {
    override fun open(folder: ExportFolder, artifact: Artifact): Engine {
        val place = File(folder.path, artifact.target)
        return try {
            when (artifact.runtime) {
                "executorch" -> {
                    if (FORWARD !in artifact.methods) {
                        throw UserError("$place has no method $FORWARD: export it again without `stock_runner: false`")
                    }
                    ExecuTorchEngine(File(place, "model.pte"), folder.manifest.cache)
                }
                "onnxruntime" -> OrtEngine(place, folder.manifest.cache)
                ONNX_QNN -> OrtNpuEngine(place, folder.manifest.cache)
                else -> throw UserError("this app has no engine for ${artifact.runtime}: install a newer one")
            }
        } catch (error: LinkageError) {
            throw UserError("this app was built without ${artifact.runtime}: choose another engine in the settings", error)
        }
    }

    /** Hugging Face's tokenizers where this build packs their native library, else the one in Kotlin. */
    override fun tokenizer(folder: ExportFolder): TextTokenizer {
        val file = File(folder.path, "tokenizer.json")
        return if (packsTokenizers()) DjlTokenizer(file) else ByteLevelBpe(file)
    }

    private fun packsTokenizers(): Boolean = try {
        System.loadLibrary("djl_tokenizer")
        true
    } catch (_: UnsatisfiedLinkError) {
        false
    }
}
