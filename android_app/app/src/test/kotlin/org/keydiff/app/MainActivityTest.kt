package org.keydiff.app

import android.app.Activity
import android.app.AlertDialog
import android.content.ClipData
import android.content.ClipboardManager
import android.content.Intent
import android.graphics.Bitmap
import android.graphics.Canvas
import android.graphics.Rect
import android.net.Uri
import android.os.Looper
import android.view.View
import android.view.ViewGroup
import android.widget.Button
import android.widget.EditText
import android.widget.ProgressBar
import android.widget.TextView
import org.junit.Assert.assertArrayEquals
import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertTrue
import org.junit.Test
import org.junit.runner.RunWith
import org.keydiff.core.History
import org.robolectric.Robolectric
import org.robolectric.RobolectricTestRunner
import org.robolectric.RuntimeEnvironment
import org.robolectric.Shadows.shadowOf
import org.robolectric.annotation.Config
import org.robolectric.annotation.GraphicsMode
import org.robolectric.shadows.ShadowAlertDialog
import org.robolectric.shadows.ShadowPopupMenu
import java.io.File
import java.time.Duration

/** The screen on the real framework classes of Android 14. */
@RunWith(RobolectricTestRunner::class)
@Config(sdk = [34], qualifiers = "w411dp-h891dp-xhdpi")
@GraphicsMode(GraphicsMode.Mode.NATIVE)
class MainActivityTest {
    private val reader get() = RuntimeEnvironment.getApplication() as ReaderApplication

    private val device = FakeDevice()

    private fun presenter(answer: String = "Paris.", onStep: (Int) -> Unit = {}) = Presenter(
        FakeEngines(answer, onStep),
        device,
        History(File(reader.filesDir, "history.json")),
        Store(File(reader.filesDir, "settings.json")),
        Importer(File(reader.filesDir, "models")),
        Runnable::run,
        Runnable::run,
    ).also(reader::use)

    private fun start(): MainActivity = Robolectric.buildActivity(MainActivity::class.java).setup().get()

    private fun MainActivity.text(id: Int) = findViewById<TextView>(id).text.toString()

    private fun MainActivity.press(id: Int) {
        val button = findViewById<Button>(id)
        assertTrue("${button.text} can be pressed", button.isEnabled)
        button.performClick()
    }

    private fun MainActivity.menu(number: Int) {
        press(R.id.more)
        shadowOf(ShadowPopupMenu.getLatestPopupMenu()).onMenuItemClickListener
            .onMenuItemClick(ShadowPopupMenu.getLatestPopupMenu().menu.getItem(number))
    }

    @Test
    fun `the app starts with the usual presenter`() {
        val activity = start()
        assertEquals("No model open", activity.text(R.id.meter))
        assertFalse(activity.findViewById<Button>(R.id.ask).isEnabled)
        assertTrue("Memory [0-9]+ MB".toRegex().matches(activity.text(R.id.memory)))
    }

    @Test
    fun `a question is asked and answered on the screen`() {
        presenter()
        val activity = start()
        reader.presenter.open(tinyFolder)
        assertEquals("tiny · N 16 + B 8", activity.text(R.id.model))
        activity.findViewById<EditText>(R.id.question).setText("What is the capital of France?")
        activity.press(R.id.ask)
        assertTrue(activity.text(R.id.transcript).startsWith("▸ What is the capital of France?\nParis.\n"))
        assertEquals("Read 47 · held 16 of 16 · evicted 31", activity.text(R.id.meter))
        assertEquals("", activity.text(R.id.question))
        assertEquals("Done", activity.text(R.id.status))
        assertEquals(View.INVISIBLE, activity.findViewById<ProgressBar>(R.id.progress).visibility)
        activity.press(R.id.reset)
        assertEquals("Read 0 · held 0 of 16 · evicted 0", activity.text(R.id.meter))
    }

    @Test
    fun `an empty question asks nothing`() {
        presenter()
        val activity = start()
        reader.presenter.open(tinyFolder)
        activity.press(R.id.ask)
        assertEquals("Ready: fake engine", activity.text(R.id.status))
    }

    @Test
    fun `a refused question stays in its field`() {
        presenter()
        val activity = start()
        reader.presenter.open(tinyFolder)
        val long = "x".repeat(5000)
        activity.findViewById<EditText>(R.id.question).setText(long)
        activity.press(R.id.ask)
        assertTrue("the model was trained for 4096" in activity.text(R.id.status))
        assertEquals(long, activity.text(R.id.question))
    }

    @Test
    fun `a rotated or reopened screen shows the same`() {
        presenter()
        val controller = Robolectric.buildActivity(MainActivity::class.java).setup()
        reader.presenter.open(tinyFolder)
        controller.pause().stop().destroy()
        assertEquals("tiny · N 16 + B 8", start().text(R.id.model))
    }

    @Test
    fun `pushed folders are offered, and the system's picker`() {
        presenter()
        tinyFolder.copyRecursively(File(reader.getExternalFilesDir("models"), "pushed"))
        val activity = start()
        activity.press(R.id.open)
        val dialog = shadowOf(ShadowAlertDialog.getLatestAlertDialog())
        assertEquals(listOf("pushed", "Choose a folder…"), dialog.items.map { it.toString() })
        dialog.clickOnItem(1)
        assertEquals(Intent.ACTION_OPEN_DOCUMENT_TREE, shadowOf(activity).nextStartedActivity.action)
        activity.press(R.id.open)
        shadowOf(ShadowAlertDialog.getLatestAlertDialog()).clickOnItem(0)
        assertEquals("Ready: fake engine", activity.text(R.id.status))
    }

    @Test
    fun `the folder that adb pushes into is there from the start`() {
        start()
        assertTrue(File(reader.getExternalFilesDir(null), "models").isDirectory)
    }

    @Test
    fun `a folder that was picked is copied and opened`() {
        presenter()
        val activity = start()
        val phone = FolderProvider(tinyFolder.parentFile!!)
        activity.press(R.id.open)
        shadowOf(ShadowAlertDialog.getLatestAlertDialog()).clickOnItem(0)
        activity.answer(Intent.ACTION_OPEN_DOCUMENT_TREE, phone.tree(tinyFolder.name))
        assertEquals("Ready: fake engine", activity.text(R.id.status))
        val copy = File(reader.filesDir, "models/${tinyFolder.name}")
        for (file in tinyFolder.walk().filter { it.isFile }) {
            val path = file.relativeTo(tinyFolder).path
            assertArrayEquals(path, file.readBytes(), File(copy, path).readBytes())
        }
    }

    @Test
    fun `a text that was picked is read as UTF-8`() {
        presenter()
        val activity = start()
        val folder = File(reader.cacheDir, "texts").also { it.mkdirs() }
        File(folder, "book.txt").writeText("Müde bin ich.")
        File(folder, "old.txt").writeBytes("Müde".toByteArray(Charsets.ISO_8859_1))
        val phone = FolderProvider(folder)
        activity.chooseText(1)
        activity.answer(Intent.ACTION_OPEN_DOCUMENT, phone.document("old.txt"))
        assertEquals("old.txt is not UTF-8 text: convert it first", activity.text(R.id.status))
        activity.chooseText(1)
        activity.answer(Intent.ACTION_OPEN_DOCUMENT, phone.document("book.txt"))
        assertEquals("book.txt, 13 characters", activity.text(R.id.document))
        activity.press(R.id.text)
        assertEquals(activity.getString(R.string.text_none), activity.text(R.id.document))
    }

    @Test
    fun `a text is pasted from the clipboard`() {
        presenter()
        val activity = start()
        activity.chooseText(0)
        assertEquals("the clipboard holds no text: copy one first", activity.text(R.id.status))
        activity.getSystemService(ClipboardManager::class.java).setPrimaryClip(ClipData.newPlainText("", "A whole book."))
        activity.chooseText(0)
        assertEquals("Pasted text, 13 characters", activity.text(R.id.document))
    }

    @Test
    fun `a book pasted as a question becomes the text to ask about`() {
        presenter()
        val activity = start()
        val field = activity.findViewById<EditText>(R.id.question)
        field.setText("x".repeat(10_000))
        assertEquals(10_000, field.length())
        field.append("x")
        assertEquals("Pasted text, 10001 characters", activity.text(R.id.document))
        assertEquals("", activity.text(R.id.question))
    }

    @Test
    fun `memory is that of now`() {
        presenter()
        val activity = start()
        assertEquals("Memory 123 MB", activity.text(R.id.memory))
        device.resident = 456_000_000
        shadowOf(Looper.getMainLooper()).idleFor(Duration.ofSeconds(2))
        assertEquals("Memory 456 MB", activity.text(R.id.memory))
    }

    /** Presses *Open text* and takes one of its sources. */
    private fun MainActivity.chooseText(source: Int) {
        press(R.id.text)
        shadowOf(ShadowAlertDialog.getLatestAlertDialog()).clickOnItem(source)
    }

    /** Answers for the file picker that was just started. */
    private fun MainActivity.answer(action: String, uri: Uri) {
        val asked = shadowOf(this).nextStartedActivity
        assertEquals(action, asked.action)
        shadowOf(this).receiveResult(asked, Activity.RESULT_OK, Intent().setData(uri))
    }

    @Test
    fun `settings are checked, kept and shown again`() {
        presenter()
        val activity = start()
        reader.presenter.open(tinyFolder)
        activity.menu(0)
        val dialog = ShadowAlertDialog.getLatestAlertDialog() as AlertDialog
        val field = dialog.findViewById<EditText>(R.id.temperature)
        field.setText("warm")
        dialog.getButton(AlertDialog.BUTTON_POSITIVE).performClick()
        assertTrue("a wrong number keeps the form open", dialog.isShowing)
        field.setText("0.7")
        dialog.getButton(AlertDialog.BUTTON_POSITIVE).performClick()
        assertFalse(dialog.isShowing)
        assertEquals(0.7, reader.presenter.settings.answers.sampling.temperature, 0.0)
        assertEquals("onnxruntime", reader.presenter.settings.runtime)
        activity.menu(0)
        assertEquals("0.7", (ShadowAlertDialog.getLatestAlertDialog() as AlertDialog).findViewById<EditText>(R.id.temperature).text.toString())
    }

    @Test
    fun `the log is shared as text`() {
        presenter()
        val activity = start()
        activity.menu(1)
        val chooser = shadowOf(activity).nextStartedActivity
        assertEquals(Intent.ACTION_CHOOSER, chooser.action)
        @Suppress("DEPRECATION")
        val send = chooser.getParcelableExtra<Intent>(Intent.EXTRA_INTENT)!!
        assertTrue("test phone" in send.getStringExtra(Intent.EXTRA_TEXT)!!)
    }

    @Test
    fun `everything that can be touched is named and large enough for TalkBack`() {
        presenter()
        val activity = start()
        reader.presenter.open(tinyFolder)
        val small = 48 * activity.resources.displayMetrics.density
        for (view in touchable(activity.findViewById(android.R.id.content))) {
            val name = view.contentDescription ?: (view as TextView).let { it.text.ifEmpty { it.hint } }
            assertTrue("a name for $view", name.isNotBlank() && name != "⋮")
            assertTrue("$name is ${view.height} high", view.height >= small || view is EditText)
        }
        assertEquals(View.ACCESSIBILITY_LIVE_REGION_POLITE, activity.findViewById<View>(R.id.status).accessibilityLiveRegion)
    }

    @Test
    fun `every setting has a label and is large enough`() {
        presenter()
        val activity = start()
        reader.presenter.open(tinyFolder)
        activity.menu(0)
        shadowOf(Looper.getMainLooper()).idle()
        val form = (ShadowAlertDialog.getLatestAlertDialog() as AlertDialog).findViewById<View>(R.id.chat).parent as ViewGroup
        val views = (0 until form.childCount).map(form::getChildAt)
        val labels = views.filter { it.labelFor != View.NO_ID }.associateBy { it.labelFor }
        val small = 48 * activity.resources.displayMetrics.density
        for (view in views.filter { it.isFocusable }) {
            val name = if (view is Button) view.text else (labels[view.id] as TextView?)?.text
            assertTrue("a label for $view", !name.isNullOrBlank())
            assertTrue("$name is ${view.height} high", view.height >= small)
        }
        assertEquals("engine and five fields", 6, labels.size)
        save(form, "settings")
    }

    @Test
    fun `while it reads, the bar shows how far it is and Stop ends it`() {
        lateinit var activity: MainActivity
        presenter(onStep = { position ->
            if (position != 96) return@presenter
            val bar = activity.findViewById<ProgressBar>(R.id.progress)
            assertEquals(View.VISIBLE, bar.visibility)
            assertEquals(1000 * 96 / 233, bar.progress)
            assertEquals("Reading 233 tokens", activity.text(R.id.status))
            assertEquals("Read 96 · held 16 of 16 · evicted 80", activity.text(R.id.meter))
            assertFalse(activity.findViewById<Button>(R.id.ask).isEnabled)
            draw(activity, "reading")
            activity.press(R.id.stop)
        })
        activity = start()
        askAboutLighthouse(activity)
        assertEquals("Stopped after 104 of 233 tokens; nothing is kept", activity.text(R.id.status))
        assertEquals(View.INVISIBLE, activity.findViewById<ProgressBar>(R.id.progress).visibility)
    }

    @Test
    fun `on its side the screen holds everything`() = fits("+w891dp-h411dp-land", letters = 1f)

    @Test
    fun `large letters leave everything on the screen`() = fits("+w360dp-h640dp-port", letters = 1.5f)

    private fun fits(qualifiers: String, letters: Float) {
        RuntimeEnvironment.setQualifiers(qualifiers)
        RuntimeEnvironment.setFontScale(letters)
        presenter()
        val activity = start()
        askAboutLighthouse(activity)
        draw(activity, if (letters > 1) "large" else "side")
        val line = 24 * letters * activity.resources.displayMetrics.density
        val transcript = activity.findViewById<View>(R.id.scroll)
        assertTrue("the answers have ${transcript.height}", transcript.height >= 2 * line)
        for (view in touchable(activity.findViewById(android.R.id.content))) {
            val seen = Rect()
            assertTrue("$view can be seen", view.getGlobalVisibleRect(seen))
            assertEquals("$view is cut off", view.height, seen.height())
            if (view is Button) assertEquals("lines of ${view.text}", 1, view.lineCount)
        }
    }

    private fun touchable(view: View): List<View> {
        val inner = (view as? ViewGroup)?.let { group -> (0 until group.childCount).flatMap { touchable(group.getChildAt(it)) } }.orEmpty()
        return inner + if (view is Button || view is EditText) listOf(view) else emptyList()
    }

    @Test
    fun `the light screen`() = picture("light")

    @Test
    @Config(qualifiers = "+night")
    fun `the dark screen`() = picture("dark")

    private fun exactly(size: Int) = View.MeasureSpec.makeMeasureSpec(size, View.MeasureSpec.EXACTLY)

    /** Asks and draws the screen. */
    private fun picture(name: String) {
        presenter("The lighthouse keeper's name is Samuel Oakhurst.")
        val activity = start()
        askAboutLighthouse(activity)
        assertTrue("Samuel Oakhurst" in activity.text(R.id.transcript))
        val bitmap = draw(activity, name)
        val background = bitmap.getPixel(4, bitmap.height / 2)
        val brightness = listOf(16, 8, 0).sumOf { background shr it and 0xFF }
        assertTrue("$name has brightness $brightness", if (name == "dark") brightness < 3 * 80 else brightness > 3 * 200)
    }

    private fun askAboutLighthouse(activity: MainActivity) {
        reader.presenter.open(tinyFolder)
        reader.presenter.openText("lighthouse.txt") { "A long text. ".repeat(15) }
        activity.findViewById<EditText>(R.id.question).setText("Who keeps the lighthouse?")
        activity.press(R.id.ask)
    }

    private fun draw(activity: MainActivity, name: String): Bitmap {
        val root = activity.window.decorView
        shadowOf(Looper.getMainLooper()).idle()
        root.measure(exactly(root.width), exactly(root.height))
        root.layout(0, 0, root.width, root.height)
        return save(root, name)
    }

    /** A view's picture; -Dkeydiff.pictures=FOLDER keeps it. */
    private fun save(view: View, name: String): Bitmap {
        val bitmap = Bitmap.createBitmap(view.width, view.height, Bitmap.Config.ARGB_8888)
        view.draw(Canvas(bitmap))
        val folder = System.getProperty("keydiff.pictures").orEmpty()
        if (folder.isNotEmpty()) {
            File(folder).mkdirs()
            File(folder, "app-$name.png").outputStream().use { bitmap.compress(Bitmap.CompressFormat.PNG, 100, it) }
        }
        return bitmap
    }
}
