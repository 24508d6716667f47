package org.keydiff.app

import android.app.ActivityManager
import android.content.Context
import android.os.Build
import java.io.File

/** What the presenter asks of the phone. */
interface Device {
    /** Memory that can be taken before the system starts to end apps. */
    fun availableBytes(): Long

    /** Memory that this app holds now. */
    fun residentBytes(): Long

    /** Phone, system and app in one line, for the log. */
    val description: String
}

class AndroidDevice(context: Context) : Device {
    private val manager = context.getSystemService(ActivityManager::class.java)

    override fun availableBytes(): Long {
        val info = ActivityManager.MemoryInfo().also(manager::getMemoryInfo)
        return maxOf(info.availMem - info.threshold, 0)
    }

    override fun residentBytes(): Long = residentPages() * PAGE_BYTES

    override val description: String =
        "${Build.MANUFACTURER} ${Build.MODEL}, Android ${Build.VERSION.RELEASE}, ${Build.SUPPORTED_ABIS.firstOrNull()}"

    private fun residentPages(): Long = File("/proc/self/statm").readText().split(" ")[1].toLong()

    private companion object {
        val PAGE_BYTES: Long = android.system.Os.sysconf(android.system.OsConstants._SC_PAGESIZE)
    }
}
