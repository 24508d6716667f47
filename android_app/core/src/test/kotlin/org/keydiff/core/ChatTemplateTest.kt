package org.keydiff.core

import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertNull
import org.junit.jupiter.api.Assertions.assertThrows
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import java.io.File

class ChatTemplateTest {
    @TempDir
    lateinit var temporary: File

    private val template = ChatTemplate(ChatTemplate.Piece("<u>", "<a>"), "</a><u>", ChatTemplate.Piece("<s>", "</s><u>"), false)

    @Test
    fun `pieces stand around what people say`() {
        assertEquals("<u> hi <a>", template.first(" hi "))
        assertEquals("<s>be kind</s><u>hi<a>", template.first("hi", "be kind"))
        assertEquals("<u>hi<a>", template.first("hi", "  "))
        assertEquals("</a><u>more<a>", template.next("more"))
        assertEquals("<s>be kind</s><u>hi<a>", template.copy(trims = true).first(" hi\n", " be kind "))
    }

    @Test
    fun `what a template lacks is one line`() {
        assertThrows(UserError::class.java) { template.copy(system = null).first("hi", "be kind") }
        assertThrows(UserError::class.java) { template.copy(followUp = null).next("more") }
    }

    @Test
    fun `an exported folder's template is read, and none is none`() {
        val folder = openTiny()
        assertEquals("<user>hi<bot>", checkNotNull(ChatTemplate.load(folder)).first("hi"))
        val copy = copyOf(folder, File(temporary, "copy"))
        val manifest = File(copy, "manifest.json")
        val entry = Regex("""\{\s*"path": "chat.json"[^}]*},""")
        assertTrue(entry in manifest.readText())
        manifest.writeText(manifest.readText().replace(entry, ""))
        assertNull(ChatTemplate.load(ExportFolder.open(copy)))
    }
}
