{{- define "nibble.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "nibble.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "nibble.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "nibble.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "nibble.selector" -}}
app.kubernetes.io/name: {{ include "nibble.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "nibble.labels" -}}
{{ include "nibble.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* (dict "root" $ "image" .Values.gateway.image) */}}
{{- define "nibble.image" -}}
{{- $all := .root.Values.image -}}
{{- if .image.digest -}}
{{ $all.registry }}/{{ .image.name }}@{{ .image.digest }}
{{- else -}}
{{ $all.registry }}/{{ .image.name }}:{{ $all.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* A model as it is served: its own values over the defaults. (dict "root" $ "model" .) */}}
{{- define "nibble.model" -}}
{{- mergeOverwrite (deepCopy .root.Values.modelDefaults) .model | toYaml -}}
{{- end -}}

{{/* The name of a model's objects: RELEASE-MODEL. (dict "root" $ "model" $m) */}}
{{- define "nibble.modelname" -}}
{{- printf "%s-%s" (include "nibble.fullname" .root)
      (.model.name | lower | replace "." "-" | replace "_" "-" | replace "/" "-")
    | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{/* Leaders of all groups that may ever run: the gateways take a fixed list. */}}
{{- define "nibble.groups" -}}
{{- $addresses := list -}}
{{- range .Values.models -}}
{{- $m := include "nibble.model" (dict "root" $ "model" .) | fromYaml -}}
{{- $name := include "nibble.modelname" (dict "root" $ "model" $m) -}}
{{- $groups := int $m.groups -}}
{{- if $m.autoscaling.enabled -}}{{- $groups = int $m.autoscaling.maxGroups -}}{{- end -}}
{{- range until $groups -}}
{{- $addresses = append $addresses
      (printf "%s-%d.%s.%s.svc:%d" $name . $name $.Release.Namespace (int $.Values.worker.port)) -}}
{{- end -}}
{{- end -}}
{{- join "," $addresses -}}
{{- end -}}

{{- define "nibble.podsecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurity.uid }}
runAsGroup: {{ .Values.podSecurity.gid }}
fsGroup: {{ .Values.podSecurity.gid }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "nibble.containersecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Pods of one thing on different nodes and zones where possible. (dict "labels" "...") */}}
{{- define "nibble.spread" -}}
{{- range $index, $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
{{- if $index }}{{ "\n" }}{{ end -}}
- maxSkew: 1
  topologyKey: {{ $key }}
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- $.labels | nindent 6 }}
{{- end }}
{{- end -}}

{{/* Not empty where `helm test` can ask: it has a key where one is needed, and no certificate. */}}
{{- define "nibble.tested" -}}
{{- $keyless := and .Values.apiKeys.secret (not .Values.test.apiKeySecret) -}}
{{- $mutual := and .Values.tls.clients.enabled .Values.tls.clients.clientCaSecret -}}
{{- if not (or $keyless $mutual) -}}true{{- end -}}
{{- end -}}
