package org.keydiff.core

import io.github.optimumcode.json.schema.JsonSchema
import io.github.optimumcode.json.schema.ValidationError
import kotlinx.serialization.SerializationException
import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.decodeFromJsonElement
import java.io.File
import java.io.IOException
import java.nio.charset.CharacterCodingException
import java.security.MessageDigest

internal const val MANIFEST = "manifest.json"
private const val EXPORT_AGAIN = "export the folder again and copy it whole"
internal val json = Json { ignoreUnknownKeys = true }

/** A folder made by `keydiff-export export` whose manifest and checksums hold. */
class ExportFolder private constructor(val path: File, val manifest: Manifest) {

    /** The artifact for a runtime, e.g. "onnxruntime". Throws [UserError] when the folder holds none. */
    fun artifactFor(runtime: String): Artifact =
        manifest.artifacts.firstOrNull { it.runtime == runtime }
            ?: throw UserError("$path has no artifact for $runtime: it has ${manifest.artifacts.joinToString { it.runtime }}")

    /** Throws [UserError] when an artifact needs more memory than [availableBytes]. */
    fun checkMemory(artifact: Artifact, availableBytes: Long) {
        val needed = artifact.memoryBytes()
        if (needed > availableBytes) {
            throw UserError(
                "${manifest.name} needs about ${megabytes(needed)} MB with ${artifact.runtime} and " +
                    "${megabytes(availableBytes)} MB are free: close other apps, or export with --quant 8da4w or a smaller --budget",
            )
        }
    }

    companion object {
        /**
         * Opens a folder after checking its manifest against the published schema, and every file's size and SHA-256.
         *
         * @param onFile told the name of each file before it is checked.
         * @throws UserError not an exported folder, a file missing or damaged, or another schema.
         */
        fun open(path: File, onFile: (String) -> Unit = {}): ExportFolder {
            val file = File(path, MANIFEST)
            if (!file.isFile) {
                throw UserError("$path is not an exported folder: $MANIFEST is missing; make one with `keydiff-export export`")
            }
            val manifest = json.decodeFromJsonElement<Manifest>(readChecked(file, "manifest"))
            for (entry in manifest.files + manifest.artifacts.flatMap { it.files }) {
                onFile(entry.path)
                val part = File(path, entry.path)
                if (!part.isFile) throw UserError("$part is missing: $EXPORT_AGAIN")
                if (part.length() != entry.bytes || sha256(part) != entry.sha256) {
                    throw UserError("$part does not match its checksum in $MANIFEST: $EXPORT_AGAIN")
                }
            }
            return ExportFolder(path, manifest)
        }
    }
}

/** JSON of a file that fits the published schema [schema]; throws [UserError] otherwise. */
internal fun readChecked(file: File, schema: String): JsonElement {
    val element = try {
        json.parseToJsonElement(file.readBytes().decodeToString(throwOnInvalidSequence = true))
    } catch (error: IOException) {
        val reason = if (error is CharacterCodingException) "is not valid JSON" else "cannot be read"
        throw UserError("$file $reason: $EXPORT_AGAIN", error)
    } catch (error: SerializationException) {
        throw UserError("$file is not valid JSON: $EXPORT_AGAIN", error)
    }
    val errors = mutableListOf<ValidationError>()
    if (!publishedSchema(schema).validate(element, errors::add)) {
        val first = errors.first()
        throw UserError("$file does not match its schema at ${first.objectPath.toString().ifEmpty { "top level" }}: ${first.message}")
    }
    return element
}

private fun publishedSchema(name: String): JsonSchema {
    val stream = ExportFolder::class.java.getResourceAsStream("/org/keydiff/core/$name.schema.json")
    return JsonSchema.fromDefinition(checkNotNull(stream).use { it.readBytes().decodeToString() })
}

private fun sha256(file: File): String {
    val digest = MessageDigest.getInstance("SHA-256")
    val buffer = ByteArray(1 shl 20)
    file.inputStream().use { stream ->
        while (true) {
            val count = stream.read(buffer)
            if (count < 0) break
            digest.update(buffer, 0, count)
        }
    }
    return digest.digest().joinToString("") { "%02x".format(it) }
}

internal fun megabytes(bytes: Long): Long = (bytes + 999_999) / 1_000_000
