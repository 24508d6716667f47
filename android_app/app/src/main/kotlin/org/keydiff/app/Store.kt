package org.keydiff.app

import kotlinx.serialization.Serializable
import kotlinx.serialization.SerializationException
import kotlinx.serialization.encodeToString
import kotlinx.serialization.json.Json
import org.keydiff.core.Settings
import org.keydiff.core.UserError
import java.io.File

/** What the settings screen holds; [runtime] names the engine, null for the folder's first. */
@Serializable
data class AppSettings(val answers: Settings = Settings(), val runtime: String? = null)

/** Settings in a file. */
class Store(private val file: File) {
    private val json = Json { ignoreUnknownKeys = true }

    /** The saved settings, or the usual ones when there are none or they are not readable. */
    fun load(): AppSettings = try {
        if (file.isFile) json.decodeFromString(file.readText()) else AppSettings()
    } catch (_: SerializationException) {
        AppSettings()
    } catch (_: UserError) {
        AppSettings()
    }

    fun save(settings: AppSettings) = file.writeText(json.encodeToString(settings))
}
