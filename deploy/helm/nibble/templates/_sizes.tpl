{{/* Bytes of a quantity: "10Gi", "512M", "4GiB", "1048576". */}}
{{- define "nibble.bytes" -}}
{{- $text := toString . -}}
{{- $number := regexFind "^[0-9]+(\\.[0-9]+)?" $text -}}
{{- $unit := trimPrefix $number $text | trimSuffix "B" -}}
{{- $factors := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000
      "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- if or (not $number) (not (hasKey $factors $unit)) -}}
{{- fail (printf "%q is no size; allowed: a number with k, M, G, T, Ki, Mi, Gi or Ti" $text) -}}
{{- end -}}
{{- mulf (float64 $number) (float64 (get $factors $unit)) | int64 -}}
{{- end -}}

{{/* Thousandths of a core: "4", "1500m". */}}
{{- define "nibble.millicores" -}}
{{- $text := toString . -}}
{{- if hasSuffix "m" $text -}}
{{- trimSuffix "m" $text | int64 -}}
{{- else -}}
{{- mulf (float64 $text) 1000.0 | int64 -}}
{{- end -}}
{{- end -}}

{{/*
Threads of a rank. A pod's cpu limit is a quota, not a set of cores, so the program would count the
node's cores. The model's own number wins.
*/}}
{{- define "nibble.threads" -}}
{{- $limits := default dict .resources.limits -}}
{{- $requests := default dict .resources.requests -}}
{{- $cpu := coalesce $limits.cpu $requests.cpu -}}
{{- if .threads -}}
{{- int .threads -}}
{{- else if $cpu -}}
{{- max 1 (div (include "nibble.millicores" $cpu | int64) (mul 1000 (div (int .tp) (int .machines)))) -}}
{{- else -}}
0
{{- end -}}
{{- end -}}

{{/* Size of /dev/shm. */}}
{{- define "nibble.sharedmemory" -}}
{{- .sharedMemory | default (ternary "1Gi" "64Mi" (eq .device "cuda")) -}}
{{- end -}}

{{/* A size in bytes of the node's disk: logs, and a model that is fetched into the pod's own folder.
     (dict "model" $m "logs" "64Mi") */}}
{{- define "nibble.disk" -}}
{{- $folder := 0 -}}
{{- if not (or .model.claim (hasPrefix "oci://" .model.source)) -}}
{{- $folder = include "nibble.bytes" .model.sourceSize | int64 -}}
{{- end -}}
{{- add $folder (include "nibble.bytes" .logs | int64) -}}
{{- end -}}

{{/* The pod's resources: the model's own, its disk, and with device cuda a GPU for each rank. */}}
{{- define "nibble.podresources" -}}
{{- $requests := dict "ephemeral-storage" (include "nibble.disk" (dict "model" . "logs" .logStorage.request)) -}}
{{- $limits := dict "ephemeral-storage" (include "nibble.disk" (dict "model" . "logs" .logStorage.limit)) -}}
{{- if eq .device "cuda" -}}
{{- $_ := set $limits .gpuResource (div (int .tp) (int .machines)) -}}
{{- end -}}
{{- mergeOverwrite (dict "requests" $requests "limits" $limits) (deepCopy .resources) | toYaml -}}
{{- end -}}

{{/* Refuses a model whose parts cannot fit, with the numbers. */}}
{{- define "nibble.check" -}}
{{- $limits := default dict .resources.limits -}}
{{- if mod (int .tp) (int .machines) -}}
{{- fail (printf "model %q: tp %d is no multiple of machines %d" .name (int .tp) (int .machines)) -}}
{{- end -}}
{{- if and (gt (int .machines) 1) .autoscaling.enabled -}}
{{- fail (printf "model %q: autoscaling of groups over several machines is not supported" .name) -}}
{{- end -}}
{{- $here := div (int .tp) (int .machines) -}}
{{- $cuda := eq .device "cuda" -}}
{{- if and $cuda (hasKey $limits .gpuResource) -}}
{{- fail (printf "model %q: %s is counted from tp; take it out of resources" .name .gpuResource) -}}
{{- end -}}
{{- if not (or $cuda .memoryPerRank) -}}
{{- fail (printf "model %q: memoryPerRank is not set" .name) -}}
{{- end -}}
{{- $image := hasPrefix "oci://" .source -}}
{{- if and $image .claim -}}
{{- fail (printf "model %q: an oci:// source is a volume of its own; take out the claim" .name) -}}
{{- end -}}
{{- if not (or $image .claim .sourceSize) -}}
{{- fail (printf "model %q: it has neither a claim nor a sourceSize to be fetched into" .name) -}}
{{- end -}}
{{- if and .source (not $image) (or (eq .path ".") (contains "/" .path)) -}}
{{- fail (printf "model %q: a fetched model's path is one folder, not %q" .name .path) -}}
{{- end -}}
{{- if not $limits.memory -}}
{{- fail (printf "model %q: resources.limits.memory is not set; it bounds weights, KV and shared memory" .name) -}}
{{- end -}}
{{- $limit := include "nibble.bytes" $limits.memory | int64 -}}
{{- $shm := 0 -}}
{{- if gt (int .tp) 1 -}}{{- $shm = include "nibble.bytes" (include "nibble.sharedmemory" .) | int64 -}}{{- end -}}
{{- $ranks := 0 -}}
{{- if not $cuda -}}{{- $ranks = mul $here (include "nibble.bytes" .memoryPerRank | int64) -}}{{- end -}}
{{- $need := add $ranks $shm (include "nibble.bytes" .headroom | int64) -}}
{{- if gt (int64 $need) $limit -}}
{{- fail (printf "model %q: %d ranks x %s + shared memory %d B + headroom %s = %d B, more than limits.memory %s (%d B)"
      .name (int $here) (ternary "0" .memoryPerRank $cuda) $shm .headroom $need $limits.memory $limit) -}}
{{- end -}}
{{- if .autoscaling.enabled -}}
{{- if gt (int .autoscaling.minGroups) (int .autoscaling.maxGroups) -}}
{{- fail (printf "model %q: autoscaling.minGroups %d is above maxGroups %d" .name (int .autoscaling.minGroups) (int .autoscaling.maxGroups)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
