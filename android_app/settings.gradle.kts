// For Android Studio. Not built in CI, where neither Gradle nor the Android SDK can be had: scripts/build_apk.sh builds
// the same sources there, and Maven (pom.xml) compiles and tests them.
pluginManagement {
    repositories {
        google()
        mavenCentral()
        gradlePluginPortal()
    }
}
dependencyResolutionManagement {
    repositories {
        google()
        mavenCentral()
    }
}
rootProject.name = "keydiff-reader"
include(":core", ":app")
