plugins {
    id("com.android.application")
    kotlin("android")
    kotlin("plugin.serialization")
}

android {
    namespace = "org.keydiff.app"
    compileSdk = 34
    defaultConfig {
        applicationId = "org.keydiff.app"
        minSdk = 26
        targetSdk = 34
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
    }
    buildTypes {
        release {
            isMinifyEnabled = true
            proguardFiles(getDefaultProguardFile("proguard-android-optimize.txt"), "rules.pro")
            signingConfig = signingConfigs.getByName("debug")
        }
    }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_1_8
        targetCompatibility = JavaVersion.VERSION_1_8
    }
    packaging {
        // Desktops' native libraries inside the jars of DJL and JNA.
        resources.excludes += listOf("native/**", "com/sun/jna/**", "META-INF/**")
    }
}

kotlin {
    compilerOptions { jvmTarget.set(org.jetbrains.kotlin.gradle.dsl.JvmTarget.JVM_1_8) }
}

dependencies {
    implementation(project(":core"))
    implementation("com.microsoft.onnxruntime:onnxruntime-android:1.29.0")
    // The release of the Python package that wrote the .pte; docs/android.md tells what is known of pairs.
    implementation("org.pytorch:executorch-android:${property("executorch.version")}") {
        exclude(group = "androidx.core")
    }
    // Hugging Face's tokenizers as a native library; without it the app uses its tokenizer in Kotlin.
    implementation("ai.djl.android:tokenizer-native:0.33.0")
}
