package org.keydiff.app

import android.app.Activity
import android.app.AlertDialog
import android.view.LayoutInflater
import android.view.View
import android.widget.ArrayAdapter
import android.widget.EditText
import android.widget.Spinner
import android.widget.Switch
import android.widget.Toast
import org.keydiff.core.Sampling
import org.keydiff.core.Settings
import org.keydiff.core.UserError

/** Reads and writes [AppSettings] on the settings form. */
class SettingsDialog(private val activity: Activity, private val presenter: Presenter) {
    private val form: View = LayoutInflater.from(activity).inflate(R.layout.settings, null)

    fun show(): AlertDialog {
        fill(presenter.settings)
        val dialog = AlertDialog.Builder(activity)
            .setTitle(R.string.settings)
            .setView(form)
            .setPositiveButton(R.string.save, null)
            .setNegativeButton(R.string.cancel, null)
            .show()
        // Set after showing: a form with a wrong number stays open.
        dialog.getButton(AlertDialog.BUTTON_POSITIVE).setOnClickListener {
            try {
                presenter.change(read())
                dialog.dismiss()
            } catch (error: UserError) {
                Toast.makeText(activity, error.message, Toast.LENGTH_LONG).show()
            }
        }
        return dialog
    }

    private fun fill(settings: AppSettings) {
        val runtimes = presenter.runtimes
        val spinner = form.findViewById<Spinner>(R.id.runtime)
        spinner.adapter = ArrayAdapter(activity, android.R.layout.simple_spinner_dropdown_item, runtimes)
        spinner.isEnabled = runtimes.size > 1
        settings.runtime?.let { spinner.setSelection(maxOf(runtimes.indexOf(it), 0)) }
        val answers = settings.answers
        write(R.id.temperature, answers.sampling.temperature)
        write(R.id.top_p, answers.sampling.topP)
        write(R.id.seed, answers.sampling.seed)
        write(R.id.max_new_tokens, answers.maxNewTokens)
        write(R.id.instructions, answers.instructions)
        form.findViewById<Switch>(R.id.chat).isChecked = answers.chat
        form.findViewById<Switch>(R.id.beyond).isChecked = answers.beyondTrainedContext
    }

    private fun read() = AppSettings(
        Settings(
            sampling = Sampling(
                number(R.id.temperature, R.string.temperature, String::toDoubleOrNull),
                number(R.id.top_p, R.string.top_p, String::toDoubleOrNull),
                number(R.id.seed, R.string.seed, String::toIntOrNull),
            ),
            maxNewTokens = number(R.id.max_new_tokens, R.string.max_new_tokens, String::toIntOrNull),
            chat = form.findViewById<Switch>(R.id.chat).isChecked,
            instructions = text(R.id.instructions),
            beyondTrainedContext = form.findViewById<Switch>(R.id.beyond).isChecked,
        ),
        form.findViewById<Spinner>(R.id.runtime).selectedItem as String? ?: presenter.settings.runtime,
    )

    private fun <T : Any> number(id: Int, label: Int, parse: (String) -> T?): T =
        parse(text(id).trim()) ?: throw UserError("${activity.getString(label)}: \"${text(id)}\" is not a number")

    private fun text(id: Int) = form.findViewById<EditText>(id).text.toString()

    private fun write(id: Int, value: Any) = form.findViewById<EditText>(id).setText(value.toString())
}
