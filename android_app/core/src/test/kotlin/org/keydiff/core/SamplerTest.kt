package org.keydiff.core

import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertThrows
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test
import kotlin.math.abs
import kotlin.math.ln

class SamplerTest {
    private val logits = floatArrayOf(ln(0.1f), ln(0.5f), ln(0.1f), ln(0.3f))

    @Test
    fun `greedy takes the largest, the first of equals`() {
        assertEquals(1L, Sampler(Sampling()).choose(floatArrayOf(0f, 3f, 3f, -1f)))
    }

    @Test
    fun `tokens are drawn as often as they are likely`() {
        val sampler = Sampler(Sampling(temperature = 1.0, seed = 7))
        val counts = IntArray(4)
        repeat(20_000) { counts[sampler.choose(logits).toInt()]++ }
        for ((count, wanted) in counts.zip(listOf(0.1, 0.5, 0.1, 0.3))) assertTrue(abs(count / 20_000.0 - wanted) < 0.015)
    }

    @Test
    fun `a low temperature sharpens`() {
        val sampler = Sampler(Sampling(temperature = 0.25, seed = 7))
        val best = (1..2000).count { sampler.choose(logits) == 1L }
        assertTrue(abs(best / 2000.0 - 0.0625 / (0.0625 + 0.0081 + 2 * 0.0001)) < 0.03)
    }

    @Test
    fun `top-p keeps the likeliest only`() {
        val sampler = Sampler(Sampling(temperature = 1.0, topP = 0.7, seed = 3))
        assertEquals(setOf(1L, 3L), (1..500).map { sampler.choose(logits) }.toSet())
        val narrow = Sampler(Sampling(temperature = 1.0, topP = 0.01))
        assertEquals(setOf(1L), (1..100).map { narrow.choose(logits) }.toSet())
    }

    @Test
    fun `top-p takes as few tokens of a large vocabulary as reach the mass`() {
        val random = kotlin.random.Random(1)
        val large = FloatArray(5000) { (8 * random.nextDouble()).toFloat() }
        val order = large.indices.sortedByDescending { large[it] }
        val whole = large.sumOf { kotlin.math.exp(it.toDouble()) }
        for (topP in listOf(0.02, 0.5, 0.999)) {
            var mass = 0.0
            val wanted = order.takeWhile { token -> (mass < topP * whole).also { mass += kotlin.math.exp(large[token].toDouble()) } }
            val sampler = Sampler(Sampling(temperature = 1.0, topP = topP, seed = 5))
            val drawn = (1..3000).map { sampler.choose(large).toInt() }.toSet()
            assertTrue(wanted.containsAll(drawn), "$topP drew tokens outside its mass")
            if (wanted.size < 200) assertEquals(wanted.toSet(), drawn)
        }
    }

    @Test
    fun `a seed draws the same again`() {
        fun draw(seed: Int) = Sampler(Sampling(1.5, 1.0, seed)).let { sampler -> List(50) { sampler.choose(logits) } }
        assertEquals(draw(1), draw(1))
        assertTrue(draw(1) != draw(2))
    }

    @Test
    fun `settings out of range are refused`() {
        for (bad in listOf<() -> Unit>({ Sampling(-0.1) }, { Sampling(Double.NaN) }, { Sampling(1.0, 0.0) }, { Sampling(1.0, 1.1) }, { Settings(maxNewTokens = 0) })) {
            assertThrows(UserError::class.java) { bad() }
        }
    }

    @Test
    fun `logits that are no numbers are refused`() {
        assertThrows(UserError::class.java) { Sampler(Sampling()).choose(floatArrayOf(1f, Float.NaN)) }
    }
}
