#!/usr/bin/env bash
# Compiles the app's resources: OUTPUT/resources.apk, OUTPUT/java (class R) and what Robolectric reads of both.
# Usage: bash scripts/android_resources.sh FRAMEWORK_JAR OUTPUT
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/android_env.sh
need aapt2 aapt
framework="$1"
output="$2"
source=android_app/app/src/main
rm -rf "$output"
mkdir -p "$output/java" "$output/test/com/android/tools"
aapt2 compile --dir "$source/res" -o "$output/compiled.zip"
# Debian's aapt2 is older than the framework and says so once a table; its errors still end the script.
aapt2 link -o "$output/resources.apk" -I "$framework" --manifest "$source/AndroidManifest.xml" --java "$output/java" \
    --min-sdk-version 26 --target-sdk-version 34 "$output/compiled.zip" 2> >(grep -v 'Unknown chunk type' >&2)
cat >"$output/test/com/android/tools/test_config.properties" <<PROPERTIES
android_merged_manifest=$PWD/$source/AndroidManifest.xml
android_resource_apk=$output/resources.apk
android_custom_package=org.keydiff.app
PROPERTIES
