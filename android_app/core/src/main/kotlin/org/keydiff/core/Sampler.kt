package org.keydiff.core

import kotlinx.serialization.Serializable
import kotlin.math.exp
import kotlin.random.Random

/**
 * How the next token is drawn: greedy at temperature 0, else from the smallest set of tokens whose probabilities reach
 * [topP]. The same [seed] draws the same tokens on every phone.
 */
@Serializable
data class Sampling(val temperature: Double = 0.0, val topP: Double = 1.0, val seed: Int = 0) {
    init {
        if (!(temperature >= 0)) throw UserError("temperature must be at least 0, got $temperature")
        if (!(topP > 0 && topP <= 1)) throw UserError("top-p must be above 0 and at most 1, got $topP")
    }
}

/** Draws token ids from logits, with a random state of its own. */
class Sampler(private val sampling: Sampling) {
    private val random = Random(sampling.seed)

    /** A token id for logits [V]. */
    fun choose(logits: FloatArray): Long {
        val best = argmax(logits)
        if (!logits[best].isFinite()) throw UserError("the model's output is not a number: export the folder again")
        return (if (sampling.temperature == 0.0) best else draw(logits, logits[best])).toLong()
    }

    private fun draw(logits: FloatArray, largest: Float): Int {
        val weights = DoubleArray(logits.size) { exp((logits[it] - largest) / sampling.temperature) }
        val nucleus = nucleus(weights)
        var rest = random.nextDouble() * nucleus.sumOf { weights[it] }
        for (token in nucleus) {
            rest -= weights[token]
            if (rest < 0) return token
        }
        return nucleus.last()
    }

    /** The most likely tokens, as few as reach the wanted mass, the likeliest first; all of them, unsorted, for mass 1. */
    private fun nucleus(weights: DoubleArray): List<Int> {
        if (sampling.topP == 1.0) return weights.indices.toList()
        val sum = weights.sum()
        // All tokens below this together miss less than the mass that is left out, so none of them is in the nucleus;
        // to sort a whole vocabulary for every token would take longer than a step of a small model.
        val least = (1 - sampling.topP) * sum / weights.size
        val order = weights.indices.filter { weights[it] >= least }.sortedByDescending { weights[it] }
        val wanted = sampling.topP * sum
        var mass = 0.0
        val last = order.indexOfFirst { token ->
            mass += weights[token]
            mass >= wanted
        }
        return if (last < 0) order else order.subList(0, last + 1)
    }
}

/** Index of the largest number, the first of equals; NaN counts as largest, so that it cannot hide. */
internal fun argmax(values: FloatArray): Int {
    var best = 0
    for (i in values.indices) {
        if (values[i].isNaN()) return i
        if (values[i] > values[best]) best = i
    }
    return best
}
