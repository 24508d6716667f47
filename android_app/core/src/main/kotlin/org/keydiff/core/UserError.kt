package org.keydiff.core

/** Something that the person at the phone can put right: one line that says what is wrong, where, and what to do. */
class UserError(message: String, cause: Throwable? = null) : Exception(message, cause)
