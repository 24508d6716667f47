package org.keydiff.app

import org.keydiff.core.UserError
import java.io.File
import java.io.InputStream

/** A folder chosen in the system's file picker: names relative to it, sizes, and their bytes. */
interface SourceFolder {
    val name: String

    fun files(): List<SourceFile>
}

class SourceFile(val path: String, val bytes: Long, val open: () -> InputStream)

/** Copies a chosen folder into the app's own storage, where the engines can map its files. */
class Importer(private val target: File) {
    /**
     * The copy; it replaces an older one of the same name, and appears whole or not at all.
     *
     * @param progress told bytes copied, of all.
     * @throws UserError not an exported folder, or not enough storage.
     */
    fun copy(source: SourceFolder, progress: (Long, Long) -> Unit): File {
        val files = source.files()
        if (files.none { it.path == "manifest.json" }) {
            throw UserError("${source.name} is not an exported folder: manifest.json is missing; choose the folder that holds it")
        }
        val total = files.sumOf { it.bytes }
        target.mkdirs()
        if (total > target.usableSpace) {
            throw UserError("${source.name} needs ${total / 1_000_000} MB of storage and ${target.usableSpace / 1_000_000} MB are free")
        }
        val temporary = File(target, ".${source.name}.partial")
        temporary.deleteRecursively()
        var copied = 0L
        try {
            for (file in files) {
                val place = File(temporary, file.path)
                if (!place.canonicalPath.startsWith(temporary.canonicalPath + File.separator)) {
                    throw UserError("${source.name} holds a file with a bad name: ${file.path}")
                }
                place.parentFile?.mkdirs()
                file.open().use { input -> place.outputStream().use(input::copyTo) }
                copied += file.bytes
                progress(copied, total)
            }
            val place = File(target, source.name)
            place.deleteRecursively()
            if (!temporary.renameTo(place)) throw UserError("cannot write $place")
            return place
        } finally {
            temporary.deleteRecursively()
        }
    }
}
