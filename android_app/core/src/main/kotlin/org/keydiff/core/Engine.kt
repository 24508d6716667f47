package org.keydiff.core

/**
 * An artifact, loaded and ready to step. Not safe for use by two threads at once.
 *
 * @property budget N, the most tokens held a layer and KV head.
 * @property block B, the most tokens a step takes.
 */
abstract class Engine(val budget: Int, val block: Int) : AutoCloseable {
    /** What runs, for people: runtime, version, provider. */
    abstract val description: String

    /** Tokens read since the last [reset]. */
    @Volatile
    var seen: Int = 0
        private set

    /** Tokens read, held and evicted so far. */
    val meter: ContextMeter get() = ContextMeter(seen, minOf(seen, budget), budget)

    /** Reads 1..[block] tokens and returns the logits [V] after the last; the array is reused by the next step. */
    fun step(tokens: LongArray): FloatArray {
        require(tokens.size in 1..block) { "a step takes 1 to $block tokens, got ${tokens.size}" }
        val logits = run(tokens, seen)
        seen += tokens.size
        return logits
    }

    /** Forgets everything read so far. Slots are not cleared: what is held follows from the position. */
    fun reset() {
        seen = 0
    }

    protected abstract fun run(tokens: LongArray, start: Int): FloatArray
}

/** What the cache has seen: [read] tokens, of which [held] are held in [budget] slots. */
data class ContextMeter(val read: Int, val held: Int, val budget: Int) {
    /** Tokens that left the cache. */
    val evicted: Int get() = read - held
}
