plugins {
    kotlin("jvm")
    kotlin("plugin.serialization")
}

kotlin {
    compilerOptions {
        jvmTarget.set(org.jetbrains.kotlin.gradle.dsl.JvmTarget.JVM_1_8)
        freeCompilerArgs.add("-Xjdk-release=1.8")
    }
}

java {
    sourceCompatibility = JavaVersion.VERSION_1_8
    targetCompatibility = JavaVersion.VERSION_1_8
}

tasks.processResources {
    from("../../keydiff_export/schemas") {
        include("*.schema.json")
        into("org/keydiff/core")
    }
}

dependencies {
    api("org.jetbrains.kotlinx:kotlinx-serialization-json:1.9.0")
    implementation("io.github.optimumcode:json-schema-validator:0.5.2")
    implementation("ai.djl.huggingface:tokenizers:0.33.0")
    compileOnly("com.microsoft.onnxruntime:onnxruntime:1.29.0")
}
