{{/* The name of a Secret for TLS: as given, or the one that cert-manager makes.
     (dict "root" $ "secret" .Values... "name" "gateway-tls") */}}
{{- define "nibble.tlssecret" -}}
{{- if .secret -}}
{{ .secret }}
{{- else if .root.Values.tls.certManager.issuer.name -}}
{{ printf "%s-%s" (include "nibble.fullname" .root) .name }}
{{- else -}}
{{- fail (printf "tls: no Secret is named for %s and tls.certManager.issuer.name is empty; allowed: one of the two" .name) -}}
{{- end -}}
{{- end -}}

{{- define "nibble.clientstlssecret" -}}
{{- include "nibble.tlssecret" (dict "root" . "secret" .Values.tls.clients.secret "name" "gateway-tls") -}}
{{- end -}}
{{- define "nibble.gatewaytlssecret" -}}
{{- include "nibble.tlssecret" (dict "root" . "secret" .Values.tls.internal.gatewaySecret "name" "gateway-internal-tls") -}}
{{- end -}}
{{- define "nibble.workertlssecret" -}}
{{- include "nibble.tlssecret" (dict "root" . "secret" .Values.tls.internal.workerSecret "name" "worker-internal-tls") -}}
{{- end -}}

{{/* Arguments of a program whose port speaks TLS from /etc/nibble/FOLDER. (dict "folder" "tls") */}}
{{- define "nibble.porttls" -}}
- --tls-cert=/etc/nibble/{{ .folder }}/tls.crt
- --tls-key=/etc/nibble/{{ .folder }}/tls.key
{{- end -}}

{{/* A Secret as a volume: readable for the programs' group alone. (dict "name" .. "secret" ..) */}}
{{- define "nibble.secretvolume" -}}
- name: {{ .name }}
  secret: {secretName: {{ .secret }}, defaultMode: 0440}
{{- end -}}

{{/* A certificate by cert-manager. (dict "root" $ "name" .. "usages" (list ..) "dnsNames" (list ..)) */}}
{{- define "nibble.certificate" -}}
{{- $cm := .root.Values.tls.certManager -}}
apiVersion: cert-manager.io/v1
kind: Certificate
metadata:
  name: {{ include "nibble.fullname" .root }}-{{ .name }}
  labels: {{- include "nibble.labels" .root | nindent 4 }}
spec:
  secretName: {{ include "nibble.fullname" .root }}-{{ .name }}
  duration: {{ $cm.duration }}
  renewBefore: {{ $cm.renewBefore }}
  privateKey: {algorithm: ECDSA, size: 256, rotationPolicy: Always}
  usages: {{- toYaml .usages | nindent 4 }}
  dnsNames: {{- toYaml .dnsNames | nindent 4 }}
  issuerRef: {name: {{ $cm.issuer.name }}, kind: {{ $cm.issuer.kind }}, group: cert-manager.io}
{{- end -}}
