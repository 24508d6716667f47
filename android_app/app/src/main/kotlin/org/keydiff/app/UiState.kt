package org.keydiff.app

/** Everything on the screen, as text and switches. */
data class UiState(
    val title: String,
    val meter: String,
    val speed: String,
    val memory: String,
    val status: String,
    /** Thousandths of the prompt that were read, or null when nothing is being read. */
    val progress: Int?,
    val transcript: String,
    val document: String?,
    val canOpen: Boolean,
    val canAsk: Boolean,
    val canStop: Boolean,
    val canReset: Boolean,
)
