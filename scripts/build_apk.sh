#!/usr/bin/env bash
# Builds, signs (debug key made on the spot) and checks the app without the Android SDK.
# Usage: bash scripts/build_apk.sh [OUTPUT.apk]   default: exported/keydiff-reader.apk
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/android_env.sh
need javac openjdk-17-jdk-headless
need aapt2 aapt
need zipalign zipalign
need apksigner apksigner
need zip zip
output="${1:-exported/keydiff-reader.apk}"
libraries="$(android_libraries)"
r8="$(pinned r8)"
oldest="$(pinned framework-26)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

echo "== classes and resources"
maven --quiet package -DskipTests -Dkeydiff.executorch="$libraries/classes/executorch.jar"
app=android_app/app/target
framework="$(find "$android_cache/maven/org/robolectric/android-all" -name 'android-all-14-*.jar')"

echo "== one dex of what is used"
# The runtime jars carry desktops' native libraries as resources; only classes and our schemas go on.
mkdir "$work/dex"
.venv/bin/python scripts/check_apk.py java-8 "$work/java8.jar"
java -Xmx2g -cp "$r8" com.android.tools.r8.R8 --release --min-api 26 --lib "$framework" \
    --pg-conf android_app/app/rules.pro --output "$work/dex" \
    --lib "$work/java8.jar" "$app"/keydiff-app-*.jar android_app/core/target/keydiff-core-*.jar "$libraries"/classes/*.jar "$app"/runtime/*.jar >"$work/r8.log" 2>&1 ||
    { cat "$work/r8.log" >&2; exit 1; }

echo "== calls that Android 8 does not have"
java -cp "$r8" com.android.tools.r8.tracereferences.TraceReferences --check --lib "$work/java8.jar" --lib "$oldest" --source "$work/dex/classes.dex" \
    >"$work/missing.txt" 2>&1 || true
.venv/bin/python scripts/check_apk.py references "$work/missing.txt"

echo "== package"
cp "$app/resources/resources.apk" "$work/unaligned.apk"
mkdir -p "$work/package/org/keydiff/core"
cp "$work"/dex/classes*.dex "$work/package"
cp keydiff_export/schemas/*.schema.json "$work/package/org/keydiff/core"
(cd "$work/package" && zip -q -X "$work/unaligned.apk" classes*.dex org/keydiff/core/*)
# Stored, not compressed: Android maps them from the package. Aligned to pages of 16 KB.
(cd "$libraries" && zip -q -X -0 "$work/unaligned.apk" lib/*/*.so)
zipalign -f 16384 "$work/unaligned.apk" "$work/aligned.apk"
key="$android_cache/debug.keystore"
[ -f "$key" ] || keytool -genkeypair -keystore "$key" -storepass android -keypass android -alias debug -keyalg RSA \
    -keysize 2048 -validity 10000 -dname "CN=Android Debug" 2>/dev/null
mkdir -p "$(dirname "$output")"
apksigner sign --min-sdk-version 26 --ks "$key" --ks-pass pass:android --out "$work/signed.apk" "$work/aligned.apk"

echo "== checks"
apksigner verify --verbose "$work/signed.apk" | head -n 4
.venv/bin/python scripts/check_apk.py package "$work/signed.apk" --program "${PROGRAM:-}"
mv "$work/signed.apk" "$output"
echo "$output: $(stat -c %s "$output") bytes"
