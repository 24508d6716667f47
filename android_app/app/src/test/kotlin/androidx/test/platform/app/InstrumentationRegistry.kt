package androidx.test.platform.app

import android.app.Instrumentation
import android.os.Bundle

/**
 * Robolectric tells AndroidX Test what it runs, and AndroidX Test is on Google's Maven only. These few classes stand in
 * for it, so that Maven's default repository is enough; the tests here ask AndroidX Test nothing.
 */
object InstrumentationRegistry {
    private var instance: Instrumentation? = null

    @JvmStatic
    fun registerInstance(instrumentation: Instrumentation?, @Suppress("UNUSED_PARAMETER") arguments: Bundle?) {
        instance = instrumentation
    }

    @JvmStatic
    fun getInstrumentation(): Instrumentation = checkNotNull(instance)
}
