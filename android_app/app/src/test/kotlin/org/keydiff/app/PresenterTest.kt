package org.keydiff.app

import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertNull
import org.junit.Assert.assertThrows
import org.junit.Assert.assertTrue
import org.junit.Rule
import org.junit.Test
import org.junit.rules.TemporaryFolder
import org.keydiff.core.ExportFolder
import org.keydiff.core.History
import org.keydiff.core.Sampling
import org.keydiff.core.Settings
import org.keydiff.core.UserError
import java.io.File
import java.util.concurrent.Executor

class PresenterTest {
    @get:Rule
    val temporary = TemporaryFolder()

    private val engines = FakeEngines()
    private val device = FakeDevice()
    private val tasks = ArrayDeque<Runnable>()
    private val states = mutableListOf<UiState>()
    private val state get() = states.last()
    private val file get() = File(temporary.root, "history.json")
    private val presenter by lazy { presenter() }

    private fun presenter(engines: Engines = this.engines, worker: Executor = Executor { tasks += it }) = Presenter(
        engines,
        device,
        History(file),
        Store(File(temporary.root, "settings.json")),
        Importer(File(temporary.root, "models")),
        worker,
        Runnable::run,
        now = { 7 },
    ).also { it.attach(states::add) }

    private fun work() {
        while (tasks.isNotEmpty()) tasks.removeFirst().run()
    }

    private fun open() {
        presenter.open(tinyFolder)
        work()
    }

    private fun copy(): File = File(temporary.root, "copy").also { tinyFolder.copyRecursively(it) }

    @Test
    fun `it begins with nothing open`() {
        presenter
        assertEquals("No model open", state.meter)
        assertTrue(state.canOpen)
        assertFalse(state.canAsk || state.canStop || state.canReset)
        assertNull(state.progress)
        assertEquals("TTFT – · read – · answer –", state.speed)
    }

    @Test
    fun `a folder is checked and opened`() {
        presenter.open(tinyFolder)
        assertFalse("nothing can be started twice", state.canOpen)
        work()
        assertEquals("tiny · N 16 + B 8", state.title)
        assertEquals("Read 0 · held 0 of 16 · evicted 0", state.meter)
        assertEquals("Ready: fake engine", state.status)
        assertEquals("Memory 123 MB", state.memory)
        assertTrue(state.canAsk && state.canOpen)
        assertTrue(states.any { it.status == "Checking tokenizer.json" })
    }

    @Test
    fun `a damaged folder is one message and the app goes on`() {
        val copy = copy()
        File(copy, "tokenizer.json").appendText(" ")
        presenter.open(copy)
        work()
        assertTrue(state.status, "tokenizer.json does not match its checksum" in state.status)
        assertTrue(state.canOpen)
        assertFalse(state.canAsk)
        open()
        assertTrue(state.canAsk)
    }

    @Test
    fun `too little memory is one message and nothing is loaded`() {
        device.available = 1000
        open()
        assertTrue(state.status, "tiny needs about" in state.status && "1 MB are free" in state.status)
        assertFalse(state.canAsk)
        assertEquals(0, engines.opened.size)
    }

    @Test
    fun `a question is read, answered and kept`() {
        open()
        presenter.ask("What is the capital of France?")
        assertEquals("Reading", state.status)
        assertTrue(state.canStop)
        assertFalse(state.canAsk || state.canOpen || state.canReset)
        work()
        val reading = states.filter { it.status == "Reading 41 tokens" }
        assertEquals((reading.indices).map { minOf(8 * (it + 1), 41) }, reading.map { it.meter.split(" ")[1].toInt() })
        assertTrue(reading.all { Regex("TTFT – · read .* tokens/s · answer –").matches(it.speed) })
        assertEquals(listOf(195, 390, 585, 780, 975, 1000), reading.map { it.progress })
        val answering = states.filter { it.status == "Answering" }.map { it.transcript.substringAfter('\n') }
        assertEquals(listOf("P", "Pa", "Par", "Pari", "Paris", "Paris.", "Paris."), answering)
        val speeds = states.filter { it.status == "Answering" }.map { it.speed }
        assertTrue(speeds.first(), Regex("TTFT .* s · read .* tokens/s · answer –").matches(speeds.first()))
        assertTrue("while it answers", speeds.drop(1).all { Regex("TTFT .* s · read .* tokens/s · answer .* tokens/s").matches(it) })
        assertEquals("Done", state.status)
        assertNull(state.progress)
        assertEquals("Read 47 · held 16 of 16 · evicted 31", state.meter)
        assertTrue(state.speed, Regex("TTFT .* s · read .* tokens/s · answer .* tokens/s").matches(state.speed))
        assertTrue(state.transcript.startsWith("▸ What is the capital of France?\nParis.\ntiny: 41 tokens read in "))
        assertTrue(state.canAsk && state.canReset)
    }

    @Test
    fun `history survives a restart`() {
        open()
        presenter.ask("Where?")
        work()
        presenter()
        assertTrue(state.transcript.startsWith("▸ Where?\nParis."))
        presenter().clearHistory()
        assertEquals("", state.transcript)
        assertEquals(0, History(file).turns.size)
    }

    @Test
    fun `stop ends the reading and empties the context`() {
        open()
        presenter.attach { states += it; if (it.meter.startsWith("Read 16")) presenter.stop() }
        presenter.ask("x".repeat(500))
        work()
        assertEquals("Stopped after 16 of 511 tokens; nothing is kept", state.status)
        assertEquals("Read 0 · held 0 of 16 · evicted 0", state.meter)
        assertEquals("", state.transcript)
        assertTrue(state.canAsk)
        assertFalse(state.canStop || state.canReset)
    }

    @Test
    fun `stop ends the answer and keeps it`() {
        open()
        presenter.attach { states += it; if (it.transcript.endsWith("Par")) presenter.stop() }
        presenter.ask("Where?")
        work()
        assertEquals("Stopped", state.status)
        assertTrue(state.transcript.startsWith("▸ Where?\nPar\n"))
    }

    @Test
    fun `reset empties the context`() {
        open()
        presenter.ask("Where?")
        work()
        presenter.reset()
        assertEquals("Read 0 · held 0 of 16 · evicted 0", state.meter)
        assertFalse(state.canReset)
        presenter.ask("Where?")
        work()
        assertEquals("Done", state.status)
    }

    @Test
    fun `a second question to a model that takes one is refused in one line`() {
        open()
        repeat(2) {
            presenter.ask("Where?")
            work()
        }
        assertTrue(state.status, "press Reset before the next" in state.status)
        assertTrue(state.canAsk && state.canReset)
    }

    @Test
    fun `a text goes before the question`() {
        open()
        presenter.openText("book.txt") { "It was a dark night." }
        work()
        assertEquals("book.txt, 20 characters", state.document)
        presenter.ask("When?")
        work()
        assertEquals("Read ${6 + 20 + 2 + 5 + 5 + 6} · held 16 of 16 · evicted 28", state.meter)
        assertNull(state.document)
        presenter.openText("empty.txt") { " \n" }
        work()
        assertEquals("empty.txt is empty: open another text", state.status)
        presenter.openText("b.txt") { "b" }
        work()
        presenter.removeText()
        assertNull(state.document)
    }

    @Test
    fun `settings are kept and used`() {
        open()
        presenter.change(AppSettings(Settings(Sampling(0.5, 0.9, 3), maxNewTokens = 2), runtime = null))
        presenter.ask("Where?")
        work()
        assertEquals("Stopped at the longest answer allowed in the settings", state.status)
        assertEquals(2, Store(File(temporary.root, "settings.json")).load().answers.maxNewTokens)
        File(temporary.root, "settings.json").writeText("{\"answers\": {\"maxNewTokens\": 0}}")
        assertEquals(AppSettings(), Store(File(temporary.root, "settings.json")).load())
    }

    @Test
    fun `where one engine cannot be loaded another can be chosen`() {
        device.available = 1000
        open()
        assertFalse(state.canAsk)
        assertEquals(listOf("onnxruntime"), presenter.runtimes)
        device.available = 4_000_000_000
        presenter.change(AppSettings(runtime = "onnxruntime"))
        work()
        assertEquals("Ready: fake engine", state.status)
    }

    @Test
    fun `another engine is loaded in place of the old one`() {
        open()
        presenter.change(AppSettings(runtime = "onnxruntime"))
        work()
        assertEquals(listOf(true, false), engines.opened.map { it.closed })
        presenter.change(AppSettings(runtime = "nothing that the folder has"))
        work()
        assertTrue("the folder's first is taken", state.canAsk)
    }

    @Test
    fun `a chosen folder is copied whole`() {
        presenter.import(Picked(tinyFolder))
        work()
        assertEquals("Ready: fake engine", state.status)
        assertTrue(File(temporary.root, "models/${tinyFolder.name}/onnx-cpu/weights.data").isFile)
        assertTrue(states.any { it.progress == 1000 })
        presenter.import(Picked(tinyFolder, without = "manifest.json"))
        work()
        assertTrue(state.status, "is not an exported folder" in state.status)
        presenter.import(Picked(tinyFolder, breakAt = "tokenizer.json"))
        work()
        assertTrue(state.status, "something unexpected" in state.status && "unplugged" in state.status)
        assertEquals(listOf(tinyFolder.name), File(temporary.root, "models").list()!!.toList())
        presenter.import(Picked(tinyFolder, renamed = "../../out"))
        work()
        assertTrue(state.status, "bad name" in state.status)
    }

    @Test
    fun `the log tells what happened and not what was said`() {
        open()
        presenter.ask("secret?")
        work()
        presenter.open(temporary.root)
        work()
        val log = presenter.log.text()
        for (part in listOf("7 test phone", "opened tiny none with fake engine", "answered: ", "failed: ")) assertTrue(part, part in log)
        assertFalse("secret" in log || "Paris" in log)
    }

    @Test
    fun `a program without the method forward is refused before it is loaded`() {
        val folder = ExportFolder.open(tinyFolder)
        val artifact = folder.artifactFor("onnxruntime").copy(runtime = "executorch")
        val error = assertThrows(UserError::class.java) { AndroidEngines.open(folder, artifact) }
        assertTrue(error.message!!.endsWith("has no method forward: export it again without `stock_runner: false`"))
    }

    @Test
    fun `every runtime has its engine or one line`() {
        val folder = ExportFolder.open(tinyFolder)
        val artifact = folder.artifactFor("onnxruntime")
        fun refusal(runtime: String) =
            assertThrows(UserError::class.java) { AndroidEngines.open(folder, artifact.copy(runtime = runtime)) }.message
        assertEquals("this build of ONNX Runtime has no QNN provider: choose another engine in the settings", refusal("onnx-qnn"))
        assertEquals("this app has no engine for executorch-qnn: install a newer one", refusal("executorch-qnn"))
    }

    @Test
    fun `the real engine answers behind the same screen`() {
        val real = presenter(AndroidEngines, Executor(Runnable::run))
        real.open(tinyFolder)
        assertTrue(state.status, state.status.startsWith("Ready: ONNX Runtime 1."))
        real.ask("What is the capital of France?")
        assertTrue(state.meter, " · held 16 of 16 · evicted " in state.meter)
        assertTrue(state.transcript.startsWith("▸ What is the capital of France?\n"))
    }
}

/** A folder as the file picker would give it. */
private class Picked(
    private val folder: File,
    private val without: String? = null,
    private val breakAt: String? = null,
    private val renamed: String? = null,
) : SourceFolder {
    override val name: String = folder.name

    override fun files(): List<SourceFile> = folder.walk().filter { it.isFile && it.name != without }.map { file ->
        val path = file.relativeTo(folder).path
        SourceFile(if (path == "chat.json" && renamed != null) renamed else path, file.length()) {
            if (file.name == breakAt) throw java.io.IOException("unplugged") else file.inputStream()
        }
    }.toList()
}
