package org.keydiff.app

import android.content.ContentResolver
import android.net.Uri
import android.provider.DocumentsContract
import android.provider.DocumentsContract.Document
import org.keydiff.core.UserError
import java.io.FileNotFoundException
import java.io.InputStream
import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException

private val COLUMNS = arrayOf(Document.COLUMN_DOCUMENT_ID, Document.COLUMN_DISPLAY_NAME, Document.COLUMN_MIME_TYPE, Document.COLUMN_SIZE)

/** A folder that was chosen in the system's file picker. */
class PickedFolder(private val resolver: ContentResolver, private val tree: Uri) : SourceFolder {
    override val name: String = DocumentsContract.getTreeDocumentId(tree).substringAfterLast('/').substringAfterLast(':')

    override fun files(): List<SourceFile> = list(DocumentsContract.getTreeDocumentId(tree), "")

    private fun list(document: String, prefix: String): List<SourceFile> {
        val files = mutableListOf<SourceFile>()
        val children = DocumentsContract.buildChildDocumentsUriUsingTree(tree, document)
        resolver.query(children, COLUMNS, null, null, null)?.use { cursor ->
            while (cursor.moveToNext()) {
                val id = cursor.getString(0)
                val path = prefix + cursor.getString(1)
                if (cursor.getString(2) == Document.MIME_TYPE_DIR) {
                    files += list(id, "$path/")
                } else {
                    files += SourceFile(path, cursor.getLong(3)) { open(DocumentsContract.buildDocumentUriUsingTree(tree, id)) }
                }
            }
        }
        return files
    }

    private fun open(uri: Uri): InputStream = resolver.openInputStream(uri) ?: throw FileNotFoundException(uri.toString())
}

/** Name and text of a document that was chosen in the system's file picker. */
class PickedText(private val resolver: ContentResolver, private val uri: Uri) {
    val name: String
        get() = resolver.query(uri, arrayOf(Document.COLUMN_DISPLAY_NAME), null, null, null)?.use {
            if (it.moveToFirst()) it.getString(0) else null
        } ?: uri.lastPathSegment.orEmpty()

    /** Throws [UserError] when it is not UTF-8. */
    fun read(): String {
        val bytes = (resolver.openInputStream(uri) ?: throw FileNotFoundException(uri.toString())).use { it.readBytes() }
        return try {
            Charsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes)).toString()
        } catch (error: CharacterCodingException) {
            throw UserError("$name is not UTF-8 text: convert it first", error)
        }
    }
}
