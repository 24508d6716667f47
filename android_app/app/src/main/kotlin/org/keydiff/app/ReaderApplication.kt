package org.keydiff.app

import android.app.Application
import android.os.Handler
import android.os.Looper
import android.system.Os
import org.keydiff.core.History
import java.io.File
import java.util.concurrent.Executor
import java.util.concurrent.Executors

/** Holds the presenter, so that turning the phone or leaving the screen ends nothing. */
class ReaderApplication : Application() {
    lateinit var presenter: Presenter
        private set

    override fun onCreate() {
        super.onCreate()
        // Before ONNX Runtime is loaded: its Android package reports usage otherwise.
        Os.setenv("ORT_DISABLE_TELEMETRY", "1", true)
        presenter = presenter(AndroidEngines, Executors.newSingleThreadExecutor())
        // Makes the folder: one that adb made would belong to the shell, and the app could not read it.
        getExternalFilesDir(MODELS)
    }

    /** A presenter over this app's files. */
    fun presenter(engines: Engines, worker: Executor): Presenter {
        val handler = Handler(Looper.getMainLooper())
        return Presenter(
            engines,
            AndroidDevice(this),
            History(File(filesDir, "history.json")),
            Store(File(filesDir, "settings.json")),
            Importer(File(filesDir, MODELS)),
            worker,
            { task -> if (Looper.myLooper() == Looper.getMainLooper()) task.run() else handler.post(task) },
        )
    }

    /** For tests: another presenter in place of the usual one. */
    fun use(presenter: Presenter) {
        this.presenter = presenter
    }

    /** Exported folders on the phone: copied by the app, or pushed by adb. */
    fun models(): List<File> = listOfNotNull(File(filesDir, MODELS), getExternalFilesDir(MODELS))
        .flatMap { it.listFiles().orEmpty().toList() }
        .filter { File(it, "manifest.json").isFile }
        .sortedBy { it.name }

    private companion object {
        const val MODELS = "models"
    }
}
