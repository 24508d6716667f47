package org.keydiff.core

import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertFalse
import org.junit.jupiter.api.Assertions.assertNull
import org.junit.jupiter.api.Assertions.assertThrows
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test

/** Says a fixed script, whatever it reads, and remembers what it was fed. */
private class ScriptedEngine(private val script: List<Long>, budget: Int = 16, block: Int = 8) : Engine(budget, block) {
    val fed = mutableListOf<List<Long>>()
    private var said = 0
    override val description = "script"

    override fun run(tokens: LongArray, start: Int): FloatArray {
        fed += tokens.toList()
        if (tokens.size == 1 || fed.size == 1) said = if (tokens.size == 1) said + 1 else 0
        val logits = FloatArray(256)
        logits[script[minOf(said, script.size - 1)].toInt()] = 1f
        return logits
    }

    override fun close() = Unit
}

/** One token a character; token 0 is the end and says nothing. */
private object Characters : TextTokenizer {
    override fun encode(text: String, special: Boolean) =
        (if (special) longArrayOf(1) else longArrayOf()) + text.map { it.code.toLong() }.toLongArray()

    override fun decode(tokens: LongArray) = tokens.filter { it > 1 }.joinToString("") { it.toInt().toChar().toString() }

    override fun close() = Unit
}

class ConversationTest {
    private val template = ChatTemplate(ChatTemplate.Piece("<", ">"), "|", ChatTemplate.Piece("[", "]"), trims = false)
    private val manifest = openTiny().manifest
    private val end = manifest.model.eosTokenIds.first()

    private fun conversation(engine: Engine, template: ChatTemplate? = this.template, manifest: Manifest = this.manifest) =
        Conversation(engine, Characters, template, manifest)

    private fun script(text: String) = ScriptedEngine(text.map { it.code.toLong() } + end)

    private fun text(tokens: List<Long>) = tokens.joinToString("") { it.toInt().toChar().toString() }

    @Test
    fun `a prompt is read in blocks with an exact tail`() {
        val engine = script("ok")
        val answer = conversation(engine).ask("0123456789abcdefgh", Settings(), Silent)
        assertEquals(listOf("<0123456", "789abcde", "fgh>"), engine.fed.take(3).map(::text))
        assertEquals(20, answer.promptTokens)
        assertEquals("ok", answer.text)
        assertEquals(Ending.END_OF_TEXT, answer.ending)
        assertEquals(ContextMeter(22, 16, 16), answer.meter)
        assertEquals(6, answer.meter.evicted)
    }

    @Test
    fun `the end token is neither shown nor read`() {
        val engine = script("ok")
        val answer = conversation(engine).ask("hi", Settings(), Silent)
        assertEquals(listOf('o', 'k').map { it.code.toLong() }, answer.tokens)
        assertFalse(engine.fed.flatten().contains(end))
    }

    @Test
    fun `a follow-up reads the answer's last token and the template between`() {
        val engine = script("abcdefg")
        val conversation = conversation(engine)
        val first = conversation.ask("hi", Settings(maxNewTokens = 3), Silent)
        assertEquals("abc" to Ending.TOKEN_LIMIT, first.text to first.ending)
        assertEquals(listOf("<hi>", "a", "b"), engine.fed.map(::text))
        conversation.ask("more", Settings(maxNewTokens = 1), Silent)
        assertEquals("c|more>", text(engine.fed[3]))
        assertEquals(4 + 2 + 7, conversation.meter.read)
    }

    @Test
    fun `raw prompts have no template and one start token`() {
        val engine = script("a")
        val conversation = conversation(engine, template = null)
        val settings = Settings(chat = false, maxNewTokens = 1)
        conversation.ask("hi", settings, Silent)
        conversation.ask("ho", settings, Silent)
        assertEquals(listOf("\u0001hi", "aho"), engine.fed.map(::text))
    }

    @Test
    fun `an empty prompt is refused and changes nothing`() {
        val engine = script("a")
        for (blank in listOf("", " \n\t")) {
            val error = assertThrows(UserError::class.java) { conversation(engine).ask(blank, Settings(), Silent) }
            assertTrue("the prompt is empty" in error.message!!)
        }
        assertEquals(emptyList<List<Long>>(), engine.fed)
    }

    @Test
    fun `a model without a template needs raw prompts`() {
        val error = assertThrows(UserError::class.java) { conversation(script("a"), template = null).ask("hi", Settings(), Silent) }
        assertTrue("no chat template" in error.message!!)
    }

    @Test
    fun `a template that rewrites history takes one question until reset`() {
        val conversation = conversation(script("a"), template.copy(followUp = null))
        conversation.ask("hi", Settings(maxNewTokens = 1), Silent)
        assertFalse(conversation.canFollowUp)
        val error = assertThrows(UserError::class.java) { conversation.ask("more", Settings(maxNewTokens = 1), Silent) }
        assertTrue("press Reset" in error.message!!)
        conversation.reset()
        assertTrue(conversation.canFollowUp)
        conversation.ask("more", Settings(maxNewTokens = 1), Silent)
    }

    @Test
    fun `stopped while reading it forgets and can be used again`() {
        val engine = script("ok")
        val conversation = conversation(engine)
        val stopping = object : Progress {
            override fun onRead(read: Int, total: Int, tokensPerSecond: Double, meter: ContextMeter) {
                if (read == 16) conversation.stop()
            }
        }
        val stopped = assertThrows(ReadingStopped::class.java) { conversation.ask("x".repeat(100), Settings(), stopping) }
        assertEquals(16 to 102, stopped.read to stopped.total)
        assertEquals(ContextMeter(0, 0, 16), conversation.meter)
        engine.fed.clear()
        assertEquals("ok", conversation.ask("hi", Settings(), Silent).text)
        assertEquals("<hi>", text(engine.fed.first()))
    }

    @Test
    fun `stopped while answering it keeps what was said`() {
        val engine = script("abcdefgh")
        val conversation = conversation(engine)
        val stopping = object : Progress {
            override fun onAnswer(piece: String, speed: Speed, meter: ContextMeter) {
                if (piece == "c") conversation.stop()
            }
        }
        val answer = conversation.ask("hi", Settings(), stopping)
        assertEquals("abc" to Ending.STOPPED, answer.text to answer.ending)
        conversation.ask("go", Settings(maxNewTokens = 1), Silent)
        assertEquals("c|go>", text(engine.fed.last()))
    }

    @Test
    fun `reset forgets questions and answers`() {
        val engine = script("ab")
        val conversation = conversation(engine)
        conversation.ask("hi", Settings(maxNewTokens = 1), Silent)
        conversation.reset()
        conversation.ask("hi", Settings(maxNewTokens = 1), Silent)
        assertEquals(listOf("<hi>", "<hi>"), engine.fed.map(::text))
    }

    @Test
    fun `positions beyond the trained context need permission`() {
        val limit = manifest.model.contextLimit
        val long = "x".repeat(limit - 10)
        val error = assertThrows(UserError::class.java) { conversation(script("a")).ask(long, Settings(maxNewTokens = 9), Silent) }
        assertTrue("need ${limit + 1} positions and the model was trained for $limit" in error.message!!)
        conversation(script("a")).ask(long, Settings(maxNewTokens = 8), Silent)
        conversation(script("a")).ask(long, Settings(maxNewTokens = 9, beyondTrainedContext = true), Silent)
    }

    @Test
    fun `a policy that evicts nothing refuses what does not fit`() {
        val full = manifest.copy(policy = Policy("full"))
        val error = assertThrows(UserError::class.java) {
            conversation(script("a"), manifest = full).ask("x".repeat(10), Settings(maxNewTokens = 5), Silent)
        }
        assertTrue("policy full holds 16 tokens and prompt and answer need 17" in error.message!!)
    }

    @Test
    fun `figures come from the clock`() {
        var now = 0L
        val engine = script("abcd")
        val conversation = Conversation(engine, Characters, template, manifest) { now.also { now += 1_000_000_000 } }
        val heard = mutableListOf<Speed>()
        val listening = object : Progress {
            override fun onAnswer(piece: String, speed: Speed, meter: ContextMeter) {
                heard += speed
            }
        }
        // A second a reading of the clock: start, two blocks, after the prompt, then one a token.
        val answer = conversation.ask("0123456789", Settings(), listening)
        assertEquals(Speed(4.0, 12 / 3.0, 1.0), answer.speed)
        assertEquals(listOf(null, 1.0, 1.0, 1.0, 1.0), heard.map { it.decodeTokensPerSecond })
        assertTrue(heard.all { it.secondsToFirstToken == 4.0 && it.prefillTokensPerSecond == 4.0 })
        assertNull(conversation(script("a")).ask("hi", Settings(maxNewTokens = 1), Silent).speed.decodeTokensPerSecond)
    }

    @Test
    fun `a real engine stopped in mid-prefill answers afterwards as a fresh one`() {
        val folder = openTiny()
        val case = Fixtures.read.cases.first { it.folder == Fixtures.read.tiny && !it.raw }
        tokenizer(folder).use { tokenizer ->
            ortEngine(folder).use { engine ->
                val conversation = Conversation(engine, tokenizer, ChatTemplate.load(folder), folder.manifest)
                val stopping = object : Progress {
                    override fun onRead(read: Int, total: Int, tokensPerSecond: Double, meter: ContextMeter) = conversation.stop()
                }
                assertThrows(ReadingStopped::class.java) { conversation.ask("y".repeat(300), Settings(), stopping) }
                val settings = Settings(maxNewTokens = case.maxNewTokens)
                val answer = conversation.ask(case.prompt, settings, Silent)
                assertEquals(case.tokens, answer.tokens)
                conversation.reset()
                assertEquals(case.tokens, conversation.ask(case.prompt, settings, Silent).tokens)
            }
        }
    }
}
