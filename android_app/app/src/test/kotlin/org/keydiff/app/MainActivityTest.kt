package org.keydiff.app

import android.app.AlertDialog
import android.content.Intent
import android.graphics.Bitmap
import android.graphics.Canvas
import android.os.Looper
import android.view.View
import android.view.ViewGroup
import android.widget.Button
import android.widget.EditText
import android.widget.ProgressBar
import android.widget.TextView
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

/** The screen on the real framework classes of Android 14. */
@RunWith(RobolectricTestRunner::class)
@Config(sdk = [34], qualifiers = "w411dp-h891dp-xhdpi")
@GraphicsMode(GraphicsMode.Mode.NATIVE)
class MainActivityTest {
    private val reader get() = RuntimeEnvironment.getApplication() as ReaderApplication

    private fun presenter(answer: String = "Paris.") = Presenter(
        FakeEngines(answer),
        FakeDevice(),
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
        activity.press(R.id.text)
        assertEquals(Intent.ACTION_OPEN_DOCUMENT, shadowOf(activity).nextStartedActivity.action)
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

    /** Draws the screen; -Dkeydiff.pictures=FOLDER keeps the picture. */
    private fun picture(name: String) {
        presenter("The lighthouse keeper's name is Samuel Oakhurst.")
        val activity = start()
        reader.presenter.open(tinyFolder)
        reader.presenter.openText("lighthouse.txt") { "A long text. ".repeat(15) }
        activity.findViewById<EditText>(R.id.question).setText("Who keeps the lighthouse?")
        activity.press(R.id.ask)
        assertTrue("Samuel Oakhurst" in activity.text(R.id.transcript))
        val root = activity.window.decorView
        shadowOf(Looper.getMainLooper()).idle()
        root.measure(exactly(root.width), exactly(root.height))
        root.layout(0, 0, root.width, root.height)
        val bitmap = Bitmap.createBitmap(root.width, root.height, Bitmap.Config.ARGB_8888)
        root.draw(Canvas(bitmap))
        val background = bitmap.getPixel(4, root.height / 2)
        val brightness = listOf(16, 8, 0).sumOf { background shr it and 0xFF }
        assertTrue("$name has brightness $brightness", if (name == "dark") brightness < 3 * 80 else brightness > 3 * 200)
        val folder = System.getProperty("keydiff.pictures").orEmpty()
        if (folder.isNotEmpty()) {
            File(folder).mkdirs()
            File(folder, "app-$name.png").outputStream().use { bitmap.compress(Bitmap.CompressFormat.PNG, 100, it) }
        }
    }
}
