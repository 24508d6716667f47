package org.keydiff.app

import android.content.ContentProvider
import android.content.ContentValues
import android.content.pm.ProviderInfo
import android.database.Cursor
import android.database.MatrixCursor
import android.net.Uri
import android.os.ParcelFileDescriptor
import android.provider.DocumentsContract
import android.provider.DocumentsContract.Document
import org.robolectric.RuntimeEnvironment
import org.robolectric.shadows.ShadowContentResolver
import java.io.File

/** What stands behind the system's file picker, over a folder; a document's id is `primary:` and its path below [root]. */
class FolderProvider(private val root: File) : ContentProvider() {
    init {
        attachInfo(RuntimeEnvironment.getApplication(), ProviderInfo().apply { authority = AUTHORITY })
        ShadowContentResolver.registerProviderInternal(AUTHORITY, this)
    }

    override fun onCreate() = true

    override fun query(uri: Uri, columns: Array<String>?, selection: String?, arguments: Array<String>?, order: String?): Cursor {
        val file = fileOf(uri)
        val cursor = MatrixCursor(columns)
        for (shown in if (uri.lastPathSegment == "children") file.listFiles()!!.sorted() else listOf(file)) {
            cursor.addRow(columns!!.map { column -> value(shown, column) })
        }
        return cursor
    }

    private fun value(file: File, column: String): Any = when (column) {
        Document.COLUMN_DOCUMENT_ID -> idOf(file)
        Document.COLUMN_DISPLAY_NAME -> file.name
        Document.COLUMN_MIME_TYPE -> if (file.isDirectory) Document.MIME_TYPE_DIR else "application/octet-stream"
        Document.COLUMN_SIZE -> file.length()
        else -> error("no column $column")
    }

    override fun openFile(uri: Uri, mode: String): ParcelFileDescriptor =
        ParcelFileDescriptor.open(fileOf(uri), ParcelFileDescriptor.MODE_READ_ONLY)

    override fun getType(uri: Uri): String = "application/octet-stream"

    override fun insert(uri: Uri, values: ContentValues?): Uri? = null

    override fun delete(uri: Uri, selection: String?, arguments: Array<String>?) = 0

    override fun update(uri: Uri, values: ContentValues?, selection: String?, arguments: Array<String>?) = 0

    fun document(path: String): Uri = DocumentsContract.buildDocumentUri(AUTHORITY, "primary:$path")

    fun tree(path: String): Uri = DocumentsContract.buildTreeDocumentUri(AUTHORITY, "primary:$path")

    private fun idOf(file: File) = "primary:${file.relativeTo(root).path}"

    private fun fileOf(uri: Uri) = File(root, DocumentsContract.getDocumentId(uri).removePrefix("primary:"))

    private companion object {
        const val AUTHORITY = "org.keydiff.app.test.documents"
    }
}
