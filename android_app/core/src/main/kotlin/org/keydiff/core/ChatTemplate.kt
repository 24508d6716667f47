package org.keydiff.core

import kotlinx.serialization.SerialName
import kotlinx.serialization.Serializable
import kotlinx.serialization.json.decodeFromJsonElement
import java.io.File

private const val CHAT = "chat.json"

/**
 * A model's chat template, cut at export into the texts around what people say. `keydiff-export` proves that the pieces
 * make what the template makes; a template that cannot be cut so has no chat.json.
 *
 * @property user before and after the first question; the latter ends where the answer begins.
 * @property followUp what ends an answer and starts the next question, or null when the template rewrites history.
 * @property system before and after instructions that come first, up to the question; null when it takes none.
 * @property trims whether the template strips blanks around a question.
 */
@Serializable
data class ChatTemplate(
    val user: Piece,
    @SerialName("follow_up") val followUp: String?,
    val system: Piece?,
    val trims: Boolean,
) {
    @Serializable
    data class Piece(val before: String, val after: String)

    /** The text that opens a conversation. Blank [instructions] leave the template's own in place. */
    fun first(question: String, instructions: String = ""): String {
        if (instructions.isBlank()) return user.before + cut(question) + user.after
        val around = system
            ?: throw UserError("this model's chat template takes no instructions: leave them empty in the settings")
        return around.before + cut(instructions) + around.after + cut(question) + user.after
    }

    /** The text that follows an answer. */
    fun next(question: String): String {
        val between = followUp ?: throw UserError("this model's chat template takes one question: press Reset before the next")
        return between + cut(question) + user.after
    }

    private fun cut(text: String) = if (trims) text.trim() else text

    companion object {
        /** The template of an exported folder, or null when it has none. */
        fun load(folder: ExportFolder): ChatTemplate? {
            val file = File(folder.path, CHAT)
            if (folder.manifest.files.none { it.path == CHAT }) return null
            return json.decodeFromJsonElement<ChatTemplate>(readChecked(file, "chat"))
        }
    }
}
