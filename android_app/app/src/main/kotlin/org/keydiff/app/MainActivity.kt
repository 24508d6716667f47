package org.keydiff.app

import android.app.Activity
import android.app.AlertDialog
import android.content.ActivityNotFoundException
import android.content.ClipboardManager
import android.content.Intent
import android.os.Bundle
import android.os.Handler
import android.os.Looper
import android.text.Editable
import android.text.TextWatcher
import android.view.View
import android.view.WindowManager
import android.widget.Button
import android.widget.EditText
import android.widget.PopupMenu
import android.widget.ProgressBar
import android.widget.ScrollView
import android.widget.TextView
import android.widget.Toast
import org.keydiff.core.UserError

/** The one screen: shows the presenter's state and hands it what people do. */
class MainActivity : Activity() {
    private val reader get() = application as ReaderApplication
    private val presenter get() = reader.presenter
    private var shown: UiState? = null
    private val clock = Handler(Looper.getMainLooper())
    private val tick = object : Runnable {
        override fun run() {
            presenter.refresh()
            clock.postDelayed(this, TICK_MILLIS)
        }
    }

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(R.layout.main)
        button(R.id.open).setOnClickListener { chooseModel() }
        button(R.id.text).setOnClickListener { chooseText() }
        button(R.id.ask).setOnClickListener { ask() }
        button(R.id.stop).setOnClickListener { presenter.stop() }
        button(R.id.reset).setOnClickListener { presenter.reset() }
        button(R.id.more).setOnClickListener(::showMenu)
        findViewById<EditText>(R.id.question).addTextChangedListener(object : TextWatcher {
            override fun beforeTextChanged(text: CharSequence, start: Int, count: Int, after: Int) = Unit

            override fun onTextChanged(text: CharSequence, start: Int, before: Int, count: Int) = Unit

            override fun afterTextChanged(field: Editable) = moveLongText(field)
        })
    }

    override fun onStart() {
        super.onStart()
        presenter.attach(::render)
        clock.postDelayed(tick, TICK_MILLIS)
    }

    override fun onStop() {
        clock.removeCallbacks(tick)
        presenter.detach()
        super.onStop()
    }

    override fun onActivityResult(request: Int, result: Int, data: Intent?) {
        val uri = data?.data ?: return
        if (result != RESULT_OK) return
        when (request) {
            PICK_MODEL -> presenter.import(PickedFolder(contentResolver, uri))
            PICK_TEXT -> PickedText(contentResolver, uri).let { presenter.openText(it.name, it::read) }
        }
    }

    private fun ask() {
        val field = findViewById<EditText>(R.id.question)
        if (field.text.isBlank() && shown?.document == null) {
            Toast.makeText(this, R.string.question, Toast.LENGTH_SHORT).show()
            return
        }
        presenter.ask(field.text.toString())
    }

    private fun chooseModel() {
        val folders = reader.models()
        val names = folders.map { it.name } + getString(R.string.open_pick)
        AlertDialog.Builder(this)
            .setTitle(R.string.open_title)
            .setItems(names.toTypedArray()) { _, chosen ->
                if (chosen < folders.size) presenter.open(folders[chosen]) else pick(Intent(Intent.ACTION_OPEN_DOCUMENT_TREE), PICK_MODEL)
            }
            .show()
    }

    private fun chooseText() {
        if (shown?.document != null) {
            presenter.removeText()
            return
        }
        val sources = listOf<Pair<Int, () -> Unit>>(
            R.string.text_paste to ::pasteText,
            R.string.text_pick to {
                pick(Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("text/*"), PICK_TEXT)
            },
        )
        AlertDialog.Builder(this)
            .setTitle(R.string.text_title)
            .setItems(sources.map { (title, _) -> getString(title) }.toTypedArray()) { _, chosen -> sources[chosen].second() }
            .show()
    }

    private fun pasteText() {
        val clip = getSystemService(ClipboardManager::class.java).primaryClip
        val text = clip?.takeIf { it.itemCount > 0 }?.getItemAt(0)?.coerceToText(this)?.toString().orEmpty()
        presenter.openText(getString(R.string.text_pasted)) {
            text.ifBlank { throw UserError("the clipboard holds no text: copy one first") }
        }
    }

    /** A long text pasted as a question is a text to ask about: Android saves a field with the screen, and has no room for books. */
    private fun moveLongText(field: Editable) {
        findViewById<EditText>(R.id.question).isSaveEnabled = field.length <= LONGEST_QUESTION
        if (field.length <= LONGEST_QUESTION || shown?.canOpen != true) return
        val text = field.toString()
        field.clear()
        presenter.openText(getString(R.string.text_pasted)) { text }
    }

    private fun pick(intent: Intent, request: Int) = try {
        startActivityForResult(intent, request)
    } catch (_: ActivityNotFoundException) {
        Toast.makeText(this, "This phone has no file picker: use adb push", Toast.LENGTH_LONG).show()
    }

    private fun showMenu(anchor: View) {
        val menu = PopupMenu(this, anchor)
        val actions = listOf<Pair<Int, () -> Unit>>(
            R.string.settings to { SettingsDialog(this, presenter).show() },
            R.string.share_log to ::shareLog,
            R.string.clear_history to presenter::clearHistory,
        )
        actions.forEachIndexed { number, (title, _) -> menu.menu.add(0, number, number, title) }
        menu.setOnMenuItemClickListener { item -> actions[item.itemId].second().let { true } }
        menu.show()
    }

    private fun shareLog() {
        val send = Intent(Intent.ACTION_SEND).setType("text/plain").putExtra(Intent.EXTRA_TEXT, presenter.log.text())
        startActivity(Intent.createChooser(send, getString(R.string.share_log)))
    }

    private fun render(state: UiState) {
        val before = shown
        shown = state
        write(R.id.model, state.title.ifEmpty { getString(R.string.app_name) })
        write(R.id.meter, state.meter)
        write(R.id.speed, state.speed)
        write(R.id.memory, state.memory)
        write(R.id.status, state.status)
        write(R.id.document, state.document ?: getString(R.string.text_none))
        write(R.id.text, getString(if (state.document == null) R.string.text else R.string.text_clear))
        button(R.id.open).isEnabled = state.canOpen
        button(R.id.ask).isEnabled = state.canAsk
        button(R.id.stop).isEnabled = state.canStop
        button(R.id.reset).isEnabled = state.canReset
        button(R.id.text).isEnabled = state.canOpen
        val bar = findViewById<ProgressBar>(R.id.progress)
        bar.visibility = if (state.progress == null) View.INVISIBLE else View.VISIBLE
        bar.progress = state.progress ?: 0
        if (before != null && before.answers != state.answers) findViewById<EditText>(R.id.question).setText("")
        if (before?.transcript != state.transcript) {
            write(R.id.transcript, state.transcript)
            findViewById<ScrollView>(R.id.scroll).let { it.post { it.fullScroll(View.FOCUS_DOWN) } }
        }
        if (state.canStop) window.addFlags(KEEP_ON) else window.clearFlags(KEEP_ON)
    }

    private fun write(id: Int, text: String) {
        val view = findViewById<TextView>(id)
        // The same text again would be read aloud again.
        if (view.text.toString() != text) view.text = text
    }

    private fun button(id: Int): Button = findViewById(id)

    private companion object {
        const val PICK_MODEL = 1
        const val PICK_TEXT = 2
        const val TICK_MILLIS = 2000L
        const val LONGEST_QUESTION = 10_000
        const val KEEP_ON = WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON
    }
}
