package org.keydiff.app

/** The last lines of what happened, for the share-log button. Prompts and answers are not in it. */
class Log(private val limit: Int = 500, private val now: () -> Long = System::currentTimeMillis) {
    private val lines = ArrayDeque<String>()

    @Synchronized
    fun add(line: String) {
        lines += "${now()} $line"
        while (lines.size > limit) lines.removeFirst()
    }

    @Synchronized
    fun text(): String = lines.joinToString("\n")
}
