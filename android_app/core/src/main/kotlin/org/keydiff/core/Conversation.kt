package org.keydiff.core

import kotlinx.serialization.Serializable
import java.util.concurrent.atomic.AtomicBoolean

/** How a question is put and answered. */
@Serializable
data class Settings(
    val sampling: Sampling = Sampling(),
    val maxNewTokens: Int = 256,
    val chat: Boolean = true,
    val instructions: String = "",
    val beyondTrainedContext: Boolean = false,
) {
    init {
        if (maxNewTokens < 1) throw UserError("an answer needs at least 1 token, got $maxNewTokens")
    }
}

/** Told of progress, on the thread that asks. */
interface Progress {
    /** After each block of the prompt: tokens of this prompt read, of [total], and tokens a second. */
    fun onRead(read: Int, total: Int, tokensPerSecond: Double, meter: ContextMeter) {}

    /** After each generated token: the text that became whole with it, perhaps none, and how fast it went so far. */
    fun onAnswer(piece: String, speed: Speed, meter: ContextMeter) {}
}

/** Why an answer ended. */
enum class Ending { END_OF_TEXT, TOKEN_LIMIT, STOPPED }

/** How fast an answer came; [decodeTokensPerSecond] is null until there are two tokens. */
data class Speed(val secondsToFirstToken: Double, val prefillTokensPerSecond: Double, val decodeTokensPerSecond: Double?)

/** An answer and its figures. */
class Answer(
    val promptTokens: Int,
    val tokens: List<Long>,
    val text: String,
    val ending: Ending,
    val speed: Speed,
    val meter: ContextMeter,
)

/** Thrown by [Conversation.ask] when [Conversation.stop] was called before the whole prompt was read. */
class ReadingStopped(val read: Int, val total: Int) : Exception("stopped after $read of $total tokens")

/**
 * Questions and answers over one cache: reads a prompt of any length in blocks with an exact tail, then generates token
 * by token. One thread asks; any thread may call [stop].
 */
class Conversation(
    private val engine: Engine,
    private val tokenizer: TextTokenizer,
    private val template: ChatTemplate?,
    private val manifest: Manifest,
    private val nanoTime: () -> Long = System::nanoTime,
) {
    private val stopping = AtomicBoolean()

    /** The last generated token, which no step has read yet. */
    private var unread = longArrayOf()
    private var follows = false

    val meter: ContextMeter get() = engine.meter

    /** Whether the next question continues the text read so far. */
    val canFollowUp: Boolean get() = !follows || template == null || template.followUp != null

    /** Ends a running [ask] after the step it is in. */
    fun stop() = stopping.set(true)

    /** Forgets the text and all answers. */
    fun reset() {
        engine.reset()
        unread = longArrayOf()
        follows = false
    }

    /**
     * Reads a question, which may be a whole book, and answers it. Stopped while it reads, it forgets everything.
     *
     * @throws UserError empty prompt, no chat template, or more positions than the model takes.
     * @throws ReadingStopped [stop] was called before the prompt was read.
     */
    fun ask(question: String, settings: Settings, progress: Progress): Answer {
        stopping.set(false)
        val prompt = unread + encode(question, settings)
        check(prompt.size, settings)
        val began = nanoTime()
        val logits = read(prompt, progress, began)
        return generate(prompt.size, logits, settings, progress, began)
    }

    private fun encode(question: String, settings: Settings): LongArray {
        if (question.isBlank()) throw UserError("the prompt is empty: type or open a text, or ask a question")
        if (!settings.chat) return tokenizer.encode(question, special = !follows)
        val chat = template ?: throw UserError("this model has no chat template: turn it off in the settings")
        val text = if (follows) chat.next(question) else chat.first(question, settings.instructions)
        return tokenizer.encode(text, special = false)
    }

    private fun check(tokens: Int, settings: Settings) {
        if (tokens == 0) throw UserError("the prompt has 0 tokens: give some text")
        val needed = engine.seen + tokens + settings.maxNewTokens
        if (!manifest.policy.evicts && needed > engine.budget) {
            throw UserError(
                "policy full holds ${engine.budget} tokens and prompt and answer need $needed: " +
                    "export with a larger --budget or another --policy",
            )
        }
        val limit = manifest.model.contextLimit
        if (needed > limit && !settings.beyondTrainedContext) {
            throw UserError(
                "prompt and answer need $needed positions and the model was trained for $limit: " +
                    "shorten the text, or allow longer texts in the settings",
            )
        }
    }

    private fun read(prompt: LongArray, progress: Progress, began: Long): FloatArray {
        var logits = floatArrayOf()
        for (first in prompt.indices step engine.block) {
            if (stopping.get()) {
                reset()
                throw ReadingStopped(first, prompt.size)
            }
            val last = minOf(first + engine.block, prompt.size)
            logits = engine.step(prompt.copyOfRange(first, last))
            progress.onRead(last, prompt.size, last / seconds(began, nanoTime()), engine.meter)
        }
        unread = longArrayOf()
        follows = true
        return logits
    }

    private fun generate(promptTokens: Int, first: FloatArray, settings: Settings, progress: Progress, began: Long): Answer {
        val sampler = Sampler(settings.sampling)
        val text = TextStream(tokenizer)
        var logits = first
        var ending = Ending.TOKEN_LIMIT
        val afterPrompt = nanoTime()
        var firstToken = afterPrompt
        var speed = Speed(seconds(began, afterPrompt), promptTokens / seconds(began, afterPrompt), null)
        for (number in 0 until settings.maxNewTokens) {
            val token = sampler.choose(logits)
            if (token in manifest.model.eosTokenIds) {
                ending = Ending.END_OF_TEXT
                break
            }
            unread = longArrayOf(token)
            val piece = text.add(token)
            val now = nanoTime()
            if (number == 0) {
                firstToken = now
                speed = speed.copy(secondsToFirstToken = seconds(began, now))
            } else {
                speed = speed.copy(decodeTokensPerSecond = number / seconds(firstToken, now))
            }
            progress.onAnswer(piece, speed, engine.meter)
            if (stopping.get()) {
                ending = Ending.STOPPED
                break
            }
            if (number + 1 < settings.maxNewTokens) {
                logits = engine.step(unread)
                unread = longArrayOf()
            }
        }
        progress.onAnswer(text.finish(), speed, engine.meter)
        return Answer(promptTokens, text.tokens, text.text, ending, speed, engine.meter)
    }

    private fun seconds(from: Long, to: Long): Double = maxOf(to - from, 1) / 1e9
}
