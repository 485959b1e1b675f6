#!/usr/bin/env bash
# Checks what is deployed without deploying it: Dockerfiles, compose, the manifests of every overlay, shell scripts.
#
#   lint.sh [ROOT]      ROOT: the checkout (this one). The tools come from PATH; 'make lint-deploy' puts them there.
#
# Exit status 1 when a check fails. What cannot be checked here is said, not passed over.
set -uo pipefail
root=$(cd "${1:-$(dirname "${BASH_SOURCE[0]}")/..}" && pwd) || exit 2
# KubeRay's custom resources as JSON schemas, from its CRDs, one file a kind: rayjob-v1.json, ...
schemas=${KUBERAY_SCHEMAS:-$root/../shared/schemas}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
shopt -s nullglob

# check NAME COMMAND...: says whether it went well, and what the command said where it did not.
check() {
    local name=$1
    shift
    if "$@" >"$work/said" 2>&1; then
        echo "ok       $name"
    else
        echo "FAILED   $name"
        sed 's/^/    /' "$work/said"
        status=1
    fi
}

# render NAME FOLDER: one file an object, NAME/GROUP_VERSION_KIND_NAME.yaml.
render() {
    mkdir -p "$work/manifests/$1"
    check "$1 renders" kubectl kustomize "$2" --output "$work/manifests/$1"
}

# A component changes what the base has, so one overlay will do for it.
render_component() {
    local component=$1 folder=$work/component
    mkdir -p "$folder"
    printf 'resources: [%s]\ncomponents: [%s]\n' \
        "$(realpath --relative-to="$folder" "$root/deploy/kubernetes/overlays/aws")" \
        "$(realpath --relative-to="$folder" "$component")" >"$folder/kustomization.yaml"
    render "component $(basename "$component")" "$folder"
}

# What it has no schema for, kubernetes-validate passes with a warning.
core_kinds() {
    local said failed
    said=$(kubernetes-validate --strict --quiet "$@" 2>&1)
    failed=$?
    echo "$said"
    [[ $failed == 0 && $said != *"Couldn't find schema"* ]]
}

# Custom resources of KubeRay, by kind.
custom_kinds() {
    local kind files schema
    for kind in "$@"; do
        files=("$work"/manifests/*/ray.io_v1_"$kind"_*.yaml)
        schema=$schemas/$kind-v1.json
        if [[ -f $schema ]]; then
            check "$kind" check-jsonschema --schemafile "$schema" "${files[@]}"
        else
            echo "SKIPPED  $kind: no $schema; KUBERAY_SCHEMAS says where KubeRay's schemas are"
        fi
        rm -f "${files[@]}"
    done
}

for file in "$root"/docker/*.Dockerfile; do
    check "${file#"$root/"}" hadolint "$file"
done
check docker/compose.yaml check-jsonschema --builtin-schema vendor.compose-spec "$root/docker/compose.yaml"
if command -v kubectl >/dev/null; then
    for overlay in "$root"/deploy/kubernetes/overlays/*/; do
        render "overlay $(basename "$overlay")" "$overlay"
    done
    for component in "$root"/deploy/kubernetes/components/*/; do
        render_component "$component"
    done
    custom_kinds rayjob
    check "core kinds" core_kinds "$work"/manifests/*/*.yaml
else
    echo "SKIPPED  deploy/kubernetes: no kubectl, which renders the overlays"
fi
while IFS= read -r script; do
    # Functions are called by name: by traps, and by check.
    check "${script#"$root/"}" shellcheck --exclude=SC2329 --external-sources "$script"
done < <(grep -rlEI -m1 '^#!.*\b(ba)?sh\b' "$root/docker" "$root/deploy" "$root/.ci" | sort)
exit "$status"
