{{/* What puts a model's folder where the worker reads it. (dict "root" $ "model" $m) */}}
{{- define "nibble.fetch" -}}
{{- $root := .root -}}
{{- $m := .model -}}
{{- $f := $root.Values.fetch -}}
- name: fetch
  image: {{ include "nibble.image" (dict "root" $root "image" $root.Values.gateway.image) }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  command: [/usr/bin/nibble]
  args: [fetch, {{ $m.source | quote }}, {{ printf "/models/%s" $m.path | quote }}]
  {{- if or $f.tokenSecret.name $f.endpoint $f.proxy $f.noProxy $f.caConfigMap }}
  env:
    {{- with $f.tokenSecret }}
    {{- if .name }}
    - name: HF_TOKEN
      valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key }}}}
    {{- end }}
    {{- end }}
    {{- with $f.endpoint }}
    - {name: HF_ENDPOINT, value: {{ . | quote }}}
    {{- end }}
    {{- with $f.proxy }}
    - {name: http_proxy, value: {{ . | quote }}}
    - {name: https_proxy, value: {{ . | quote }}}
    {{- end }}
    {{- with $f.noProxy }}
    - {name: no_proxy, value: {{ . | quote }}}
    {{- end }}
    {{- if $f.caConfigMap }}
    - {name: SSL_CERT_FILE, value: /etc/nibble/fetch-ca/ca.crt}
    {{- end }}
  {{- end }}
  resources: {{- toYaml $f.resources | nindent 4 }}
  securityContext: {{- include "nibble.containersecurity" $root | nindent 4 }}
  terminationMessagePolicy: FallbackToLogsOnError
  volumeMounts:
    - {name: models, mountPath: /models}
    {{- if $f.caConfigMap }}
    - {name: fetch-ca, mountPath: /etc/nibble/fetch-ca, readOnly: true}
    {{- end }}
{{- end -}}
