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
    /** Answers given since the start; a new one empties the question's field, a refused question stays in it. */
    val answers: Int,
    val canOpen: Boolean,
    val canAsk: Boolean,
    val canStop: Boolean,
    val canReset: Boolean,
)
