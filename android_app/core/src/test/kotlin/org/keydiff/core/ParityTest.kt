package org.keydiff.core

import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.params.ParameterizedTest
import org.junit.jupiter.params.provider.MethodSource
import java.io.File

/** The whole chain, from text to text, gives what `keydiff-export run` gives: token for token. */
class ParityTest {
    @ParameterizedTest
    @MethodSource("cases")
    fun `answers as keydiff-export run does`(case: Case) {
        val folder = ExportFolder.open(File(case.folder))
        var blocks = 0
        val counting = object : Progress {
            override fun onRead(read: Int, total: Int, tokensPerSecond: Double, meter: ContextMeter) {
                blocks++
                assertEquals(minOf(read, meter.budget), meter.held)
            }
        }
        tokenizer(folder).use { tokenizer ->
            ortEngine(folder).use { engine ->
                val conversation = Conversation(engine, tokenizer, ChatTemplate.load(folder), folder.manifest)
                val settings = Settings(maxNewTokens = case.maxNewTokens, chat = !case.raw)
                val answer = conversation.ask(case.prompt, settings, counting)
                assertEquals(case.promptTokens, answer.promptTokens)
                assertEquals(case.tokens, answer.tokens)
                assertEquals(case.text, answer.text)
                assertEquals(case.evictions, answer.meter.evicted)
                assertEquals(case.slots, engine.budget + engine.block)
                assertEquals((case.promptTokens + engine.block - 1) / engine.block, blocks)
            }
        }
    }

    companion object {
        @JvmStatic
        fun cases(): List<Case> = Fixtures.read.cases
    }
}
