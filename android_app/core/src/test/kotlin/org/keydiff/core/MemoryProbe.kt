package org.keydiff.core

import java.io.File

/** Prints the bytes of resident memory that an engine takes for a folder's ONNX artifact, loaded and stepped. */
fun main(arguments: Array<String>) {
    val folder = ExportFolder.open(File(arguments[0]))
    val before = residentBytes()
    ortEngine(folder).use { engine ->
        repeat(8) { engine.step(LongArray(engine.block) { 100L + it }) }
        engine.step(longArrayOf(5))
        println(residentBytes() - before)
    }
}

private fun residentBytes(): Long {
    System.gc()
    return File("/proc/self/statm").readText().split(" ")[1].toLong() * 4096
}
