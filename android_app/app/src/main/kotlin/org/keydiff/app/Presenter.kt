package org.keydiff.app

import org.keydiff.core.Answer
import org.keydiff.core.ChatTemplate
import org.keydiff.core.ContextMeter
import org.keydiff.core.Conversation
import org.keydiff.core.Ending
import org.keydiff.core.Engine
import org.keydiff.core.ExportFolder
import org.keydiff.core.History
import org.keydiff.core.Progress
import org.keydiff.core.ReadingStopped
import org.keydiff.core.Speed
import org.keydiff.core.TextTokenizer
import org.keydiff.core.Turn
import org.keydiff.core.UserError
import java.io.File
import java.util.Locale
import java.util.concurrent.Executor

/**
 * The app without its screen: takes what people do, runs it on [worker] and gives the screen a new [UiState] on [main].
 * It holds no Android type.
 */
class Presenter(
    private val engines: Engines,
    private val device: Device,
    private val history: History,
    private val store: Store,
    private val importer: Importer,
    private val worker: Executor,
    private val main: Executor,
    private val now: () -> Long = System::currentTimeMillis,
) {
    private class Loaded(val folder: ExportFolder, val engine: Engine, val tokenizer: TextTokenizer, val conversation: Conversation)

    val log = Log(now = now)
    var settings: AppSettings = store.load()
        private set

    private var loaded: Loaded? = null

    /** The folder that was opened last, also when the engine that was chosen for it could not be loaded. */
    private var opened: ExportFolder? = null
    private var screen: ((UiState) -> Unit)? = null
    private var document: Pair<String, String>? = null
    private var busy = false
    private var stoppable = false
    private var status = "Open a folder made by keydiff-export to begin"
    private var progress: Int? = null
    private var speed = speedLine(null, null, null)
    private var asking = ""
    private var answering = ""
    private var answers = 0

    init {
        log.add(device.description)
    }

    /** Runtimes that the open folder has artifacts for, also while none of them is loaded: another can be chosen. */
    val runtimes: List<String> get() = opened?.manifest?.artifacts?.map { it.runtime }?.distinct().orEmpty()

    /** Shows the present state on [screen] and every later one. */
    fun attach(screen: (UiState) -> Unit) {
        this.screen = screen
        render()
    }

    fun detach() {
        screen = null
    }

    /** Shows the present state again: memory changes without anybody doing anything. */
    fun refresh() = render()

    /** Copies a chosen folder into the app's storage and opens it. */
    fun import(source: SourceFolder) = work("Copying ${source.name}") {
        val copy = importer.copy(source) { copied, total ->
            show { progress = thousandths(copied, total) }
        }
        load(copy)
    }

    /** Opens an exported folder that is on the phone already. */
    fun open(folder: File) = work("Checking ${folder.name}") { load(folder) }

    /** Opens a text to ask about; [read] runs in the background. */
    fun openText(name: String, read: () -> String) = work("Opening $name") {
        val text = read()
        if (text.isBlank()) throw UserError("$name is empty: open another text")
        show {
            document = name to text
            status = "Ask a question about $name"
        }
    }

    fun removeText() = show { document = null }

    /** Reads the open text and the question, and answers. */
    fun ask(question: String) {
        val model = loaded ?: return
        val text = document?.second
        val prompt = listOfNotNull(text, question.takeIf { it.isNotBlank() }).joinToString("\n\n")
        work("Reading", stoppable = true) {
            show {
                asking = question.ifBlank { document?.first.orEmpty() }
                answering = ""
                speed = speedLine(null, null, null)
                progress = 0
            }
            try {
                finish(model, question, model.conversation.ask(prompt, settings.answers, Watcher()))
            } catch (stopped: ReadingStopped) {
                show {
                    asking = ""
                    status = "Stopped after ${stopped.read} of ${stopped.total} tokens; nothing is kept"
                }
                log.add("stopped reading at ${stopped.read} of ${stopped.total}")
            }
        }
    }

    fun stop() {
        loaded?.conversation?.stop()
    }

    fun reset() {
        val model = loaded ?: return
        if (busy) return
        model.conversation.reset()
        show {
            speed = speedLine(null, null, null)
            status = "The context is empty"
        }
    }

    fun clearHistory() = show { history.clear() }

    /** Keeps new settings; another engine is loaded at once. */
    fun change(settings: AppSettings) {
        val reload = settings.runtime != this.settings.runtime
        this.settings = settings
        store.save(settings)
        val folder = opened?.path
        if (reload && folder != null) open(folder) else render()
    }

    private inner class Watcher : Progress {
        override fun onRead(read: Int, total: Int, tokensPerSecond: Double, meter: ContextMeter) = show {
            progress = thousandths(read.toLong(), total.toLong())
            speed = speedLine(null, tokensPerSecond, null)
            // The same line at every block: TalkBack reads it aloud once. How far it is, bar and meter say.
            status = "Reading $total tokens"
        }

        override fun onAnswer(piece: String, speed: Speed, meter: ContextMeter) = show {
            progress = null
            this@Presenter.speed = speedLine(speed)
            status = "Answering"
            answering += piece
        }
    }

    private fun finish(model: Loaded, question: String, answer: Answer) {
        val figures = figures(answer)
        val asked = question.ifBlank { document?.first.orEmpty() }
        val shown = if (asked.length > SHOWN_QUESTION) asked.take(SHOWN_QUESTION) + "…" else asked
        history.add(Turn(model.folder.manifest.name, shown, answer.text, figures, now()))
        log.add("answered: $figures")
        show {
            answers++
            document = null
            asking = ""
            answering = ""
            speed = speedLine(answer.speed)
            status = when (answer.ending) {
                Ending.END_OF_TEXT -> "Done"
                Ending.TOKEN_LIMIT -> "Stopped at the longest answer allowed in the settings"
                Ending.STOPPED -> "Stopped"
            }
        }
    }

    private fun figures(answer: Answer): String {
        val decode = answer.speed.decodeTokensPerSecond?.let { ", answer ${rate(it)}" }.orEmpty()
        return "${answer.promptTokens} tokens read in ${decimal(answer.speed.secondsToFirstToken)} s, " +
            "${answer.tokens.size} answered$decode, ${answer.meter.evicted} evicted"
    }

    private fun load(path: File) {
        unload()
        show { opened = null }
        val folder = ExportFolder.open(path) { name -> show { status = "Checking $name" } }
        show { opened = folder }
        val wanted = settings.runtime?.takeIf { runtime -> folder.manifest.artifacts.any { it.runtime == runtime } }
        val artifact = folder.artifactFor(wanted ?: folder.manifest.artifacts.first().runtime)
        folder.checkMemory(artifact, device.availableBytes())
        val tokenizer = engines.tokenizer(folder)
        val engine = engines.open(folder, artifact)
        val conversation = Conversation(engine, tokenizer, ChatTemplate.load(folder), folder.manifest)
        log.add("opened ${folder.manifest.name} ${artifact.quant} with ${engine.description}")
        show {
            loaded = Loaded(folder, engine, tokenizer, conversation)
            status = "Ready: ${engine.description}"
        }
    }

    private fun unload() {
        val old = loaded ?: return
        loaded = null
        old.engine.close()
        old.tokenizer.close()
    }

    /** Runs a task in the background; what goes wrong becomes the status line. */
    private fun work(doing: String, stoppable: Boolean = false, task: () -> Unit) {
        if (busy) return
        busy = true
        show {
            this.stoppable = stoppable
            status = doing
        }
        worker.execute {
            val message = try {
                task()
                null
            } catch (error: UserError) {
                error.message
            } catch (error: OutOfMemoryError) {
                "not enough memory: close other apps, or export with --quant 8da4w or a smaller --budget"
            } catch (error: Exception) {
                "something unexpected went wrong (${error.javaClass.simpleName}: ${error.message}): share the log"
            }
            if (message != null) log.add("failed: $message")
            show {
                busy = false
                this.stoppable = false
                progress = null
                if (message != null) {
                    asking = ""
                    answering = ""
                    status = message
                }
            }
        }
    }

    private fun show(change: () -> Unit) = main.execute {
        change()
        render()
    }

    private fun render() {
        screen?.invoke(state())
    }

    private fun state(): UiState {
        val model = loaded
        val meter = model?.conversation?.meter
        return UiState(
            title = model?.folder?.manifest?.let { "${it.name} · N ${it.cache.budget} + B ${it.cache.block}" }.orEmpty(),
            meter = meter?.let { "Read ${it.read} · held ${it.held} of ${it.budget} · evicted ${it.evicted}" } ?: "No model open",
            speed = speed,
            memory = "Memory ${device.residentBytes() / 1_000_000} MB",
            status = status,
            progress = progress,
            transcript = transcript(),
            document = document?.let { (name, text) -> "$name, ${text.length} characters" },
            answers = answers,
            canOpen = !busy,
            canAsk = model != null && !busy,
            canStop = busy && stoppable,
            canReset = meter != null && !busy && meter.read > 0,
        )
    }

    private fun transcript(): String {
        val past = history.turns.takeLast(SHOWN_TURNS).map { "▸ ${it.question}\n${it.answer}\n${it.model}: ${it.figures}" }
        val present = if (asking.isEmpty()) emptyList() else listOf("▸ $asking\n$answering")
        return (past + present).joinToString("\n\n")
    }

    private fun thousandths(part: Long, whole: Long): Int = if (whole == 0L) 0 else (1000 * part / whole).toInt()

    private fun decimal(value: Double) = String.format(Locale.ROOT, "%.1f", value)

    private fun speedLine(speed: Speed) =
        speedLine(speed.secondsToFirstToken, speed.prefillTokensPerSecond, speed.decodeTokensPerSecond)

    private fun speedLine(firstToken: Double?, prefill: Double?, decode: Double?) = listOf(
        "TTFT ${firstToken?.let { "${decimal(it)} s" } ?: NOT_YET}",
        "read ${prefill?.let(::rate) ?: NOT_YET}",
        "answer ${decode?.let(::rate) ?: NOT_YET}",
    ).joinToString(" · ")

    private fun rate(value: Double) = "${decimal(value)} tokens/s"

    private companion object {
        const val SHOWN_TURNS = 20
        const val SHOWN_QUESTION = 300
        const val NOT_YET = "–"
    }
}
